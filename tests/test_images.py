"""One image for training: its crop, what cannot be read, and the table of images."""

import io
import random
import threading
import urllib.error
import warnings
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from data_helpers import encoded, flat, numbers, table
from PIL import EpsImagePlugin, Image, ImageFile
from torch.utils.data import DataLoader
from training_helpers import noise

from transformers_dualtoken import DualTokenImageProcessorPil
from transformers_dualtoken.data import (
    DualTokenImageDataset,
    collate_images,
)
from transformers_dualtoken.data.images import ImagePreparation, undecoded
from transformers_dualtoken.data.samples import BadSampleError
from transformers_dualtoken.image_reading import ImageBounds, UnreadableImageError, read_image


def test_crop_depends_on_seed_epoch_and_index_only(image_processor):
    def pixels(seed, epoch, index):
        dataset = DualTokenImageDataset(table(noise(0), noise(0)), image_processor, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]["pixel_values"]

    reference = pixels(0, 0, 0)
    assert reference.shape == (3, 24, 24) and -1 <= reference.min() and reference.max() <= 1
    assert torch.equal(reference, pixels(0, 0, 0))
    assert not any(torch.equal(reference, pixels(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def test_crop_keeps_its_share_of_the_area(image_processor):
    preparation = ImagePreparation(image_processor, crop_scale=(0.5, 0.6))
    areas, ratios = [], []
    for seed in range(50):
        left, top, right, bottom = preparation.random_box((200, 100), random.Random(seed))
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        areas.append((right - left) * (bottom - top) / (200 * 100))
        ratios.append((right - left) / (bottom - top))
    # Half the ratios do not fit the picture: the area is kept all the same.
    assert 0.5 - 1e-9 < min(areas) < 0.52 and 0.58 < max(areas) < 0.6 + 1e-9
    assert min(ratios) < 1.2


def test_crop_never_leaves_the_picture(image_processor):
    preparation = ImagePreparation(image_processor, crop_scale=(0.99, 1.0))
    for seed in range(300):
        left, top, right, bottom = preparation.random_box((7, 3), random.Random(seed))
        assert 0 <= left < right <= 7 and 0 <= top < bottom <= 3


@pytest.mark.parametrize("resize_mode", ["squash", "center_crop"])
def test_crop_shows_what_its_box_holds(resize_mode):
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    ramp = Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))
    preparation = ImagePreparation(DualTokenImageProcessorPil(size=50, resize_mode=resize_mode), crop_scale=(0.5, 0.6))
    left, top, right, bottom = preparation.random_box((200, 100), random.Random("a seed"))
    values = (preparation(ramp, "a seed") + 1) * 127.5
    middle = values[:, 20:30, 20:30].mean((1, 2))
    assert middle[0] == pytest.approx((left + right) / 2, abs=2) and middle[1] == pytest.approx(
        (top + bottom) / 2, abs=2
    )
    if resize_mode == "squash":
        assert values[0, 25, 0] == pytest.approx(left, abs=4) and values[0, 25, -1] == pytest.approx(right, abs=4)
        assert values[1, 0, 25] == pytest.approx(top, abs=3) and values[1, -1, 25] == pytest.approx(bottom, abs=3)


@pytest.mark.parametrize("crop_scale", [(1, 1), (0.9, 1.0)])
def test_images_of_all_modes_are_seen_as_by_the_image_processor(image_processor, crop_scale):
    grey = noise(0, (40, 30)).convert("L")
    transparent = Image.new("RGBA", (24, 24), (0, 0, 0, 0))  # black, were transparency ignored
    deep = Image.fromarray(np.full((24, 24), 32896, dtype=np.uint16))  # half of 16 bits
    palette = noise(1, (30, 40)).quantize(16)
    images = [grey, transparent, deep, palette]
    dataset = DualTokenImageDataset(table(*images), image_processor, crop_scale=crop_scale)
    pixels = [dataset[index]["pixel_values"] for index in range(4)]
    assert torch.equal(pixels[0][0], pixels[0][1]) and pixels[0].std() > 0.1
    assert (pixels[1] == 1).all()
    torch.testing.assert_close(pixels[2], torch.full((3, 24, 24), 128 / 127.5 - 1))
    if crop_scale == (1, 1):
        expected = image_processor(images=images, return_tensors="pt").pixel_values
        assert torch.equal(torch.stack(pixels), expected)


@pytest.mark.parametrize("crop_scale", [(0, 1), (0.9, 0.8), (0.9, 1.1)])
def test_crop_scale_is_checked(image_processor, crop_scale):
    with pytest.raises(ValueError, match="`crop_scale` must be a range within"):
        DualTokenImageDataset(table(noise(0)), image_processor, crop_scale=crop_scale)


def test_missing_image_column_is_named(image_processor):
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image'\]"):
        DualTokenImageDataset(table(noise(0)), image_processor, image_column="picture")


def test_cmyk_is_read_as_pil_does(tmp_path):
    image = noise(0, (16, 16)).resize((64, 64)).convert("CMYK")
    data = encoded(image, "JPEG")  # PIL writes CMYK inverted, with Adobe's marker
    assert b"Adobe" in data
    difference = np.asarray(read_image({"bytes": data, "path": None})).astype(int) - np.asarray(image.convert("RGB"))
    assert np.abs(difference).mean() < 12


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # turned right by 90 degrees
    image = read_image({"bytes": encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif), "path": None})
    assert image.size == (10, 20)


def unreadable_images() -> dict[str, tuple]:
    jpeg, png = encoded(noise(0, (64, 64)), "JPEG"), encoded(noise(0), "PNG")

    def of_size(side):
        """A PNG whose head says that it has so many pixels."""
        head = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
        return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]

    return {
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": (png[: len(png) // 2], "truncated"),
        "damaged png": (png[:40] + bytes(20) + png[60:], "damaged"),
        "empty": (b"", "empty"),
        "text": (b"<html>404 not found</html>", "no image"),
        "float": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "floating-point"),
        "bomb": (of_size(60_000), "too many pixels"),
        "large": (of_size(10_000), "too many pixels"),
        "nothing": (None, "no image"),
        "postscript": (encoded(noise(0), "EPS"), "PostScript"),
    }


@pytest.mark.parametrize("kind", unreadable_images())
def test_unreadable_images_say_why(kind):
    data, reason = unreadable_images()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match=reason):
            read_image({"bytes": data, "path": None}, 8)


def test_missing_file_and_missing_entry_say_why(tmp_path):
    with pytest.raises(UnreadableImageError, match="cannot be read .*gone.jpg"):
        read_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    with pytest.raises(UnreadableImageError, match="holds no image"):
        read_image(None)
    with pytest.raises(TypeError, match="must be a path, .* a PIL image, an array or a tensor, got int"):
        read_image(8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_errors_that_are_not_the_images_stop_the_run(image_processor, monkeypatch, error):
    def load(image):
        raise error

    dataset = DualTokenImageDataset(datasets.Dataset.from_dict({"image": [flat(0)]}), image_processor)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(error):
        dataset[0]


def test_damaged_files_never_raise_anything_else():
    rng = np.random.default_rng(0)
    outcomes = []
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"):
        clean = np.frombuffer(encoded(noise(0), format), np.uint8)
        for _ in range(60):
            data = clean.copy()
            places = rng.integers(0, min(len(data), 200), 4)
            data[places] = rng.integers(0, 256, 4)
            try:
                outcomes.append(read_image({"bytes": data.tobytes(), "path": None}, 8, 2.0).mode)
            except UnreadableImageError:
                outcomes.append("unreadable")
    assert set(outcomes) == {"RGB", "unreadable"} and outcomes.count("unreadable") > 50


def test_large_jpegs_are_decoded_at_reduced_size():
    photograph = noise(0, (8, 8)).resize((160, 120), Image.Resampling.BICUBIC)
    value = {"bytes": encoded(photograph, "JPEG", quality=95), "path": None}
    assert read_image(value, 20).size == read_image(value).size == (160, 120)
    assert read_image(value, 20, 2.0).size == (80, 60)  # 1/4 would leave 30 of the 40 pixels
    assert read_image(value, 20, 1.0).size == (40, 30)
    reduced = np.asarray(read_image(value, 20, 2.0)).astype(int)
    expected = np.asarray(photograph.reduce(2)).astype(int)
    assert np.abs(reduced - expected).mean() < 3
    # Beyond the budget, without being asked.
    bounds = ImageBounds(max_pixels=10_000)
    assert read_image(value, 20, bounds=bounds).size == (40, 30)
    with pytest.raises(UnreadableImageError, match="160 x 120, where 10,000 can be decoded"):
        read_image(value, 100, bounds=bounds)
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        read_image({"bytes": encoded(photograph), "path": None}, 20, bounds=bounds)


def test_reduced_decoding_is_seen_as_the_full_image():
    photograph = noise(0, (12, 9)).resize((640, 480), Image.Resampling.BICUBIC)
    value = {"bytes": encoded(photograph, "JPEG", quality=95), "path": None}
    processor = DualTokenImageProcessorPil(size=64)
    reduced, full = (ImagePreparation(processor, reducing_gap=gap)(value, "seed") for gap in (2.0, None))
    assert not torch.equal(reduced, full)
    assert (reduced - full).abs().mean() < 0.01 < full.std()
    exact = ImagePreparation(processor, (1, 1), None)(value, "seed")
    assert torch.equal(exact, processor(images=read_image(value), return_tensors="pt").pixel_values[0])


def test_postscript_is_never_run(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    data = encoded(noise(0), "EPS")
    for value in ({"bytes": data, "path": "photograph.jpg"}, Image.open(io.BytesIO(data))):
        with pytest.raises(UnreadableImageError, match="it is PostScript, a program and no image"):
            read_image(value, 8, 2.0)


def test_faults_of_the_network_are_not_the_images(image_processor):
    cut = ["/cut.png"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status = {"/good.png": 200, "/cut.png": 200, "/gone.png": 404}.get(self.path, 500)
            data = flat(7) if status == 200 else b"an error page"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:40] if self.path in cut else data)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        rows = datasets.Dataset.from_dict(
            {"image": [f"{address}/{name}.png" for name in ("good", "gone", "fault", "cut")]}
        )
        images = DualTokenImageDataset(rows, image_processor)
        assert numbers(images[0]["pixel_values"][None]) == [7]
        with pytest.raises(UnreadableImageError, match="no file at this URL .*/gone.png"):
            read_image(f"{address}/gone.png")
        with pytest.raises(urllib.error.HTTPError, match="500"):
            images[2]
        with pytest.raises(urllib.error.URLError, match="announced"):
            images[3]
        cut.clear()
        assert images[3]["num_skipped"] == 0  # it was not marked as unreadable
        server.shutdown()
    with pytest.raises(urllib.error.URLError):  # nobody listens any more
        images[0]


@pytest.mark.parametrize("resize_mode", ["center_crop", "pad"])
def test_crop_of_a_large_picture_is_seen_as_at_full_size(resize_mode):
    photograph = noise(0, (12, 9)).resize((640, 480), Image.Resampling.BICUBIC)
    processor = DualTokenImageProcessorPil(size=32, resize_mode=resize_mode)
    sizes = []

    def processed(images, **options):
        sizes.append(images.size)
        return processor(images=images, **options)

    reduced, full = (ImagePreparation(processor, reducing_gap=gap) for gap in (2.0, None))
    for preparation in (reduced, full):
        preparation.image_processor = Mock(side_effect=processed, resize_mode=resize_mode)
    difference = (reduced(photograph, "seed") - full(photograph, "seed")).abs()
    assert sizes == [(86, 64), (640, 480)] and difference.mean() < 0.01


def test_unreadable_images_are_replaced_counted_and_logged_once(image_processor, tmp_path, caplog):
    good = [flat(number) for number in (10, 20)]
    broken = [data for data, _ in unreadable_images().values() if data is not None]
    values = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate([good[0], *broken, good[1]])]
    dataset = datasets.Dataset.from_dict(
        {"image": [*values, None]}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    images = DualTokenImageDataset(dataset, image_processor)
    for epoch in range(2):
        images.set_epoch(epoch)
        batch = collate_images([images[index] for index in range(len(images))])
        assert numbers(batch["pixel_values"]) == [10] + [20] * (len(broken) + 1) + [10]
        assert batch["num_skipped"].tolist() == [len(broken) + 1]
        assert batch["num_skipped"].dtype == torch.int64 and "stream_position" not in batch
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == len(broken) + 1
    assert "The image 1.jpg is skipped: it is truncated or damaged" in messages[0]
    assert f"number {len(values)} of the data set" in messages[-1]


def test_replacement_is_cropped_by_its_place(image_processor):
    """Not as the same picture at its own place: they would be equal."""
    dataset = table(noise(0), noise(0))
    bad = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"", "path": None}, {"bytes": encoded(noise(0)), "path": None}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    reference, images = (DualTokenImageDataset(rows, image_processor) for rows in (dataset, bad))
    for index in range(2):
        assert torch.equal(images[index]["pixel_values"], reference[index]["pixel_values"])


def test_an_index_beyond_the_end_is_none(image_processor):
    dataset = DualTokenImageDataset(table(noise(0), noise(1)), image_processor)
    assert len(list(dataset)) == 2
    with pytest.raises(IndexError, match="There is no image 2 among 2"):
        dataset[2]


def test_nothing_but_unreadable_images(image_processor):
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"text", "path": "a.jpg"}] * 3},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    with pytest.raises(ValueError, match="None of the 3 images from number 1 on can be read"):
        DualTokenImageDataset(dataset, image_processor)[1]


def test_paths_bytes_formats_and_transforms(image_processor, tmp_path):
    (tmp_path / "a.png").write_bytes(flat(7))
    columns = {
        "paths": datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}),
        "bytes": datasets.Dataset.from_dict({"image": [flat(7)]}),
        "format": table(Image.open(tmp_path / "a.png")).with_format("torch"),
        "transform": table(Image.open(tmp_path / "a.png")).with_transform(lambda rows: {"image": rows["image"]}),
    }
    for name, dataset in columns.items():
        sample = DualTokenImageDataset(dataset, image_processor)[0]
        assert numbers(sample["pixel_values"][None]) == [7], name
    with pytest.raises(ValueError, match="'label' must hold images .*, got ClassLabel"):
        labels = datasets.Dataset.from_dict(
            {"label": [0]}, features=datasets.Features({"label": datasets.ClassLabel(names=["a"])})
        )
        DualTokenImageDataset(labels, image_processor, image_column="label")


@pytest.mark.parametrize("keep", [(), ("text", "image")])
def test_other_columns_are_dropped_before_they_are_decoded(keep):
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "other": datasets.Image()}
    )
    rows = datasets.Dataset.from_dict({"other": [b"no image"], "text": ["a"], "image": [flat(1)]}, features=features)
    for dataset in (rows, rows.to_iterable_dataset()):
        dataset = undecoded(dataset, "image", keep)
        assert dataset.column_names == ["image", *keep[:1]]
        (row,) = dataset
        assert row == {"image": {"bytes": flat(1), "path": None}, **({"text": "a"} if keep else {})}
    with pytest.raises(ValueError, match=r"no column 'label'; it has \['other', 'text', 'image'\]"):
        undecoded(rows, "image", ["label"])


def test_workers_that_live_on_see_the_new_epoch():
    dataset = DualTokenImageDataset(
        table(*(noise(index, (40, 30)) for index in range(4))), DualTokenImageProcessorPil(size=24)
    )
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=collate_images)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([batch["pixel_values"] for batch in loader])
    expected = torch.stack([dataset[index]["pixel_values"] for index in range(4)])
    assert torch.equal(torch.cat(epochs[1]), expected) and not torch.equal(torch.cat(epochs[0]), expected)


def test_streamed_images_in_an_archive_are_read(image_processor, tmp_path):
    """`datasets` streams a zip of images, as those of the Hub, by paths that only fsspec can read."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", encoded(Image.new("RGB", (20, 20), (number, 9, 9)), "png"))
    files = {"train": [str(tmp_path / "images.zip")]}
    stream = datasets.load_dataset("imagefolder", data_files=files, split="train", streaming=True)
    row = next(iter(undecoded(stream, "image")))
    assert row["image"]["bytes"] is None and row["image"]["path"].startswith("zip://")
    assert read_image(row["image"]).getpixel((0, 0)) == (0, 9, 9)


@pytest.mark.parametrize("caption", [{"raw": "a dog"}, 3, [], [" "], [1]])
def test_what_is_no_caption_is_refused(image_processor, caption):
    row = {"image": Image.new("RGB", (20, 20)), "caption": caption}
    with pytest.raises(BadSampleError, match="its 'caption' must be a caption or several"):
        ImagePreparation(image_processor).sample(row, "image", "0", "caption", tokenize=lambda texts: None)
