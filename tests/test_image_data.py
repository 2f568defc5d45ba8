"""Images for training: every kind of source and of file, and streams that go on where they were."""

import io
import json
import random
import tarfile
import threading
import urllib.error
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile
from torch.utils.data import DataLoader

from transformers_dualtoken import DualTokenImageProcessorPil
from transformers_dualtoken.data import (
    DualTokenImageDataset,
    DualTokenImageStream,
    StreamProgress,
    collate_images,
    files,
    load_image_dataset,
)
from transformers_dualtoken.data.images import ImagePreparation, undecoded
from transformers_dualtoken.image_reading import ImageBounds, UnreadableImageError, read_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Shards are copied to the cache of `datasets`: not to the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def image_processor():
    return DualTokenImageProcessorPil(size=24)


def noise(seed, size=(24, 24)) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array)


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def flat(number: int, format="PNG") -> bytes:
    """A picture that tells its number by its colour, whatever is cropped of it."""
    return encoded(Image.new("RGB", (24, 24), (number, 0, 0)), format)


def numbers(pixel_values) -> list[int]:
    return ((pixel_values[:, 0, 12, 12] + 1) * 127.5).round().int().tolist()


def table(*images) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": list(images)}, features=datasets.Features({"image": datasets.Image()}))


def write_tar(path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, images: list, column="image", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({column: values, "label": [0] * len(images)}), path, **options)
    return path


def loaded_numbers(dataset) -> list[int]:
    images = [read_image(row["image"]) for row in dataset]
    return sorted(image.getpixel((0, 0))[0] for image in images)


# One image


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


# The table


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


# Sources


def write_source(kind: str, folder: Path) -> str:
    """Pictures 0 to 11 in several files."""
    if kind == "images":
        for number in range(12):
            path = folder / f"class {number % 3}" / f"test_{number}.{'jpg' if number % 2 else 'PNG'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(flat(10 * number, "PNG"))
        (folder / "class 0" / "._test_0.jpg").write_bytes(b"left by a Mac")
        (folder / "README.md").write_text("pictures")
    elif kind == "parquet":
        for part in range(3):
            images = [flat(10 * number) for number in range(part * 4, part * 4 + 4)]
            write_parquet(folder / f"train-{part}.parquet", images, row_group_size=3)
    elif kind == "tar":
        for part in range(3):
            files = {}
            for number in range(part * 4, part * 4 + 4):
                files[f"a/{number:03}.json"] = b"not JSON"
                files[f"a/{number:03}.{('jpg', 'PNG', 'webp', 'jpeg')[number % 4]}"] = flat(10 * number)
                files[f"a/{number:03}.seg.png"] = flat(255)
            write_tar(folder / f"train-{part}.tar", files)
    else:
        dataset = datasets.Dataset.from_dict({"image": [flat(10 * number) for number in range(12)], "label": [0] * 12})
        dataset = dataset.cast_column("image", datasets.Image())
        (datasets.DatasetDict({"train": dataset}) if kind == "saved dict" else dataset).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["images", "parquet", "tar", "saved", "saved dict"])
def test_every_kind_of_source(tmp_path, kind, streaming):
    source = write_source(kind, tmp_path / "data [1]")
    dataset = load_image_dataset(source, streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    assert dataset.features == datasets.Features({"image": datasets.Image(decode=False)})
    assert loaded_numbers(dataset) == list(range(0, 120, 10))
    if kind in ("parquet", "tar"):
        pattern = f"{tmp_path}/data*/train-[01].{kind}"
        assert loaded_numbers(load_image_dataset(pattern, streaming=streaming)) == list(range(0, 80, 10))
        file = Path(source) / f"train-2.{kind}"
        assert loaded_numbers(load_image_dataset(file, streaming=streaming)) == list(range(80, 120, 10))
        assert next(iter(dataset))["image"]["path"].startswith(str(Path(source) / f"train-0.{kind}/"))


def test_key_of_a_webdataset_can_be_chosen(tmp_path):
    dataset = load_image_dataset(write_source("tar", tmp_path / "data"), image_column="seg.png")
    assert {read_image(row["seg.png"]).getpixel((0, 0))[0] for row in dataset} == {255}


def test_sample_of_a_webdataset_with_two_images_needs_a_choice(tmp_path):
    files = {"0.png": flat(1), "1.jpg": flat(2), "1.png": flat(3)}
    path = write_tar(tmp_path / "a.tar", files)
    message = r"sample '1' of the webdataset shard .*a.tar' has 2 images, with the keys \['jpg', 'png'\]. Say which"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            list(load_image_dataset(path, streaming=streaming))
    chosen = load_image_dataset(path, image_column="png")
    assert [read_image(row["png"]).getpixel((0, 0))[0] for row in chosen] == [1, 3]


def test_columns_to_keep(tmp_path):
    """With what `datasets` makes of the same files."""
    for label, number in (("cat", 1), ("dog", 2)):
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "0.png").write_bytes(flat(number))
    write_tar(tmp_path / "tars" / "0.tar", {"0.png": flat(1), "0.cls": b"0", "1.png": flat(2), "1.cls": b"1"})
    values = [{"bytes": flat(number), "path": None} for number in (1, 2)]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"label": [0, 1], "more": [0, 0], "image": values}), tmp_path / "parquet" / "0.parquet")
    datasets.Dataset.from_parquet(str(tmp_path / "parquet" / "0.parquet")).save_to_disk(tmp_path / "saved")
    for source in ("images", "tars", "tars/*.tar", "parquet", "parquet/0.parquet", "saved"):
        column = "cls" if source.startswith("tars") else "label"
        for streaming in (False, True):
            dataset = load_image_dataset(f"{tmp_path}/{source}", streaming=streaming, keep_columns=[column])
            assert dataset.column_names == ["image", column] and dataset.features["image"].decode is False
            rows = [(read_image(row["image"]).getpixel((0, 0))[0], int(row[column])) for row in dataset]
            assert rows == [(1, 0), (2, 1)], (source, streaming)
    with pytest.raises(ValueError, match="no column 'caption'; it has"):
        load_image_dataset(tmp_path / "images", keep_columns=["caption"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no images, parquet files or webdataset shards at .*empty'"):
        load_image_dataset(tmp_path / "empty", keep_columns=["label"])


@pytest.mark.parametrize("layout", ["cats dogs test", "train test", "flat"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_reads_the_same_with_and_without_labels(tmp_path, layout, streaming):
    """The same files of the same split; the classes of all splits are numbered together."""
    places = {
        "cats dogs test": {"cats/0.png": 0, "cats/1.png": 0, "dogs/2.png": 1, "test/3.png": None},
        "train test": {"train/cats/0.png": 0, "train/dogs/1.png": 1, "train/cats/2.png": 0, "test/dogs/3.png": 1},
        "flat": {f"{number}.png": None for number in range(3)} | {"val/3.png": None},
    }[layout]
    for number, place in enumerate(places):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(flat(number))
    other = "validation" if layout == "flat" else "test"
    for split, expected in (("train", [0, 1, 2]), (other, [3])):
        plain = load_image_dataset(tmp_path, split=split, streaming=streaming)
        assert loaded_numbers(plain) == expected
        arguments = {"split": split, "streaming": streaming, "keep_columns": ["label"]}
        if layout == "flat" or (layout == "cats dogs test" and split == "test"):  # images without a class
            with pytest.raises(ValueError, match=r"no column 'label'; it has \['image'\]"):
                load_image_dataset(tmp_path, **arguments)
            continue
        labelled = load_image_dataset(tmp_path, **arguments)
        assert loaded_numbers(labelled) == expected and labelled.features["label"].names == ["cats", "dogs"]
        found = {Path(row["image"]["path"]).name: row["label"] for row in labelled}
        assert found == {Path(place).name: places[place] for place in places if Path(place).name in found}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_of_the_metadata_of_a_folder(tmp_path, ending):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(flat(number))
    table = pa.table({"file_name": ["0.png", "2.png"], "label": [5, 6], "text": ["a", "b"]})
    if ending == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        {"csv": pyarrow.csv.write_csv, "parquet": pq.write_table}[ending](table, tmp_path / f"metadata.{ending}")
    for streaming in (False, True):
        rows = load_image_dataset(tmp_path, streaming=streaming, keep_columns=["text", "label"])
        assert loaded_numbers(rows) == [0, 1, 2] == loaded_numbers(load_image_dataset(tmp_path, streaming=streaming))
        assert [(row["text"], row["label"]) for row in rows] == [("a", 5), (None, None), ("b", 6)]
    with pytest.raises(ValueError, match=r"no column 'caption'; it has \['image'\]"):
        load_image_dataset(tmp_path, keep_columns=["caption"])


@pytest.mark.parametrize("values", [[1, 2], [[1, 2], [3]], [{"a": 1}], [{"bytes": 1}], [{"path": {"bytes": b""}}]])
def test_parquet_column_of_another_type(tmp_path, values):
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="'image' of the parquet file .*a.parquet' must hold images .*, got "):
            load_image_dataset(tmp_path, streaming=streaming)


def test_parquet_columns_that_hold_images(tmp_path):
    (tmp_path / "a.png").write_bytes(flat(1))
    path, data = str(tmp_path / "a.png"), flat(1)
    columns = [[path], [data], [{"path": path}], [{"bytes": data}], pa.array([data], pa.large_binary())]
    for values in columns:
        pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
        for streaming in (False, True):
            assert loaded_numbers(load_image_dataset(tmp_path / "a.parquet", streaming=streaming)) == [1]
    table(Image.open(path)).to_parquet(tmp_path / "a.parquet")  # which writes down that it is an image
    assert loaded_numbers(load_image_dataset(tmp_path / "a.parquet")) == [1]


def test_links_in_a_circle_do_not_multiply_images(tmp_path):
    for name, number in (("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(flat(number))
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "c" / "again").symlink_to(tmp_path / "c")
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0.png").write_bytes(flat(3))
    (tmp_path / "d").symlink_to(elsewhere)
    dataset = load_image_dataset(tmp_path)
    assert [row["image"]["path"] for row in dataset] == [str(tmp_path / name / "0.png") for name in "bcd"]


def bomb(kind: str, path: Path) -> Path:
    """A small shard whose second image would take more memory than it has bytes, or than it may."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            data = encoded(noise(0)) if number == 1 else flat(number)
            member.size = len(data)
            if number == 1 and kind == "sparse":
                # The size of the real file stands behind the map of its parts, of which there is none.
                member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
                header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
                header[483:495] = tarfile.itn(2**20, 12, tarfile.GNU_FORMAT)
                header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
                tar.fileobj.write(header)
                tar.offset += len(header)
                continue
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["sparse", "large"])
def test_tar_bomb_is_an_unreadable_image(tmp_path, monkeypatch, caplog, kind):
    path = bomb(kind, tmp_path / "a.tar")
    if kind == "large":
        monkeypatch.setattr(files, "MAX_FILE_BYTES", len(encoded(noise(0))) - 1)
    rows = list(load_image_dataset(path, streaming=True))
    assert [row["image"]["path"] for row in rows] == [f"{path}/{number}.png" for number in range(3)]
    assert [bool(row["image"]["bytes"]) for row in rows] == [True, False, True]
    size = 2**20 if kind == "sparse" else len(encoded(noise(0)))
    kind = "sparse file" if kind == "sparse" else "file"
    assert f"a.tar/1.png is a {kind} of {size:,} bytes and counts as an empty one" in caplog.text


def test_hard_links_of_a_shard_are_images(tmp_path):
    def link(name, target):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.LNKTYPE, target
        return member

    path = write_tar(tmp_path / "a.tar", {"0.png": flat(1), "1.png": flat(2)})
    with tarfile.open(path, "a") as tar:
        tar.addfile(link("2.png", "0.png"))
        tar.addfile(link("3.png", "1.png"))
    assert loaded_numbers(load_image_dataset(path)) == loaded_numbers(load_image_dataset(path, streaming=True))
    assert loaded_numbers(load_image_dataset(path)) == [1, 1, 2, 2]
    with tarfile.open(path, "a") as tar:
        tar.addfile(link("4.png", "gone.png"))
    with pytest.raises(ValueError, match="a.tar' cannot be read, .*'4.png' is a link to 'gone.png', which is not in"):
        load_image_dataset(path)


def test_streamed_folder_does_not_begin_with_one_class(tmp_path):
    """A stream shuffles within blocks only."""
    for number in range(40):
        path = tmp_path / f"class {number // 10}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(flat(number))
    orders = [[row["image"]["path"] for row in load_image_dataset(tmp_path, streaming=True)] for _ in range(2)]
    assert orders[0] == orders[1] != sorted(orders[0]) and len(set(orders[0])) == 40
    assert len({Path(path).parent for path in orders[0][:10]}) > 1
    assert [row["image"]["path"] for row in load_image_dataset(tmp_path)] == sorted(orders[0])


def test_changed_shards_are_read_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": flat(1)})
    assert loaded_numbers(load_image_dataset(path)) == [1]
    write_tar(path, {"0.png": flat(2), "1.png": flat(3)})
    assert loaded_numbers(load_image_dataset(path)) == [2, 3]


def test_file_in_the_working_folder_is_not_taken_for_an_image_of_a_shard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("0.png").write_bytes(flat(99))
    write_tar(tmp_path / "a.tar", {"0.png": flat(1)})
    pq.write_table(pa.table({"image": [{"bytes": flat(1), "path": "0.png"}]}), tmp_path / "b.parquet")
    for name in ("a.tar", "b.parquet"):
        assert loaded_numbers(load_image_dataset(tmp_path / name, streaming=True)) == [1]


def test_splits_of_a_folder(tmp_path, caplog):
    for place, number in (("train/0.png", 1), ("val/test/0.png", 2), ("0.png", 3), ("bus/test.png", 4)):
        path = tmp_path / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(flat(number))
    for name, number in (("a-train-00000-of-00002.tar", 1), ("a-val-0.tar", 2), ("more.tar", 3), ("test/0.tar", 4)):
        write_tar(tmp_path / "shards" / name, {"0.png": flat(number)})
    expected = {"images": {"train": [1, 3, 4], "validation": [2], "val": [2]}}
    expected["shards"] = {"train": [1, 3], "validation": [2], "test": [4]}
    for folder, splits in expected.items():
        for split, values in splits.items():
            assert loaded_numbers(load_image_dataset(tmp_path / folder, split=split, streaming=True)) == values
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 6  # one for each
    assert f"3 files of '{tmp_path}/images' are taken as the split 'train'; left out: 1 of the split" in messages[0]
    assert messages[3].endswith("split 'train'; left out: 1 of the split 'test', 1 of the split 'validation'.")
    load_image_dataset(f"{tmp_path}/shards/*.tar")  # taken whole
    assert len(caplog.records) == 6
    with pytest.raises(ValueError, match=r"no split 'test'; its files belong to \['train', 'validation'\]"):
        load_image_dataset(tmp_path / "images", split="test")


def test_hub_webdataset_has_one_column(tmp_path, monkeypatch):
    """What `datasets` makes of the shards of a data set on the Hub."""
    for part in range(2):
        write_tar(
            tmp_path / f"{part}.tar",
            {f"{part}{n}.{end}": data for n in range(2) for end, data in (("jpg", flat(n)), ("txt", b"a"))},
        )
    load_dataset = datasets.load_dataset

    def load_from_files(source, name=None, data_files=None, **options):
        assert source == "someone/pictures"
        return load_dataset("webdataset", data_files=str(tmp_path / "*.tar"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_from_files)
    for streaming in (False, True):
        dataset = load_image_dataset("someone/pictures", streaming=streaming)
        assert dataset.column_names == ["image"] and loaded_numbers(dataset) == [0, 0, 1, 1]


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(flat(0))
    write_tar(tmp_path / "mixed" / "a.tar", {"0.png": flat(0)})
    write_parquet(tmp_path / "other.parquet", [flat(0)], column="picture")
    cases = {
        tmp_path / "nowhere": "There is no file or folder at .*nowhere",
        "shards.tar": "no file or folder at 'shards.tar' .the working directory is .*, and it is not the name",
        "someone/pictures": "no file or folder at 'someone/pictures' .*, and no data set of this name can be had",
        # With files of its kind in the working directory.
        **dict.fromkeys(("imagefolder", "text", "webdataset"), "is no data set of the Hub but a reader of `datasets`"),
        f"{tmp_path}/*.tar": r"no images, parquet files or webdataset shards at .*\*.tar'; it holds no files",
        tmp_path / "empty": "empty'; it holds no files",
        tmp_path / "texts": r"texts'; its 1 files have the endings \['.txt'\]",
        tmp_path / "mixed": "mixed' holds 1 image files, 1 tar files. Give a pattern",
        tmp_path / "other.parquet": r"other.parquet' has no column 'image'; it has \['picture', 'label'\]",
    }
    for source, message in cases.items():
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message):
                load_image_dataset(source, streaming=streaming)
    with pytest.raises(ValueError, match="`name` and `data_files` are for data sets on the Hub"):
        load_image_dataset(tmp_path, name="default")


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_without_images(tmp_path, streaming):
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"a", "0.json": b"{}", "1.txt": b"b"})
    with pytest.raises(ValueError, match=r"a.tar' has 0 images, with the keys \['json', 'txt'\]"):
        load_image_dataset(path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_incomplete_samples_and_shards_of_a_webdataset_are_passed_over(tmp_path, image_processor, streaming):
    """The first sample, the first shard, a last shard of one sample, and one odd sample of many."""
    write_tar(tmp_path / "0.tar", {"0.txt": b"a"})
    write_tar(
        tmp_path / "1.tar", {"0.txt": b"a", "1.png": flat(1), "2.jpg": flat(2), "2.png": flat(2), "3.PNG": flat(3)}
    )
    write_tar(tmp_path / "2.tar", {"9.json": b"{}"})
    images = load_image_dataset(tmp_path, streaming=streaming, keep_columns=["txt", "cls"])
    rows = list(images)
    found = [read_image(row["image"]).getpixel((0, 0))[0] for row in rows if row["image"]["bytes"]]
    assert len(rows) == 6 and found == [1, 3]
    assert [row["txt"] for row in rows] == ["a", "a", None, None, None, None] and rows[0]["cls"] is None
    plain = load_image_dataset(tmp_path, streaming=streaming)
    if streaming:
        stream = DualTokenImageStream(plain, image_processor, crop_scale=(1, 1), repeat=False)
        assert sorted(numbers(sample["pixel_values"][None])[0] for sample in stream) == [1, 3]
    else:
        dataset = DualTokenImageDataset(plain, image_processor, crop_scale=(1, 1))
        assert sum(dataset[index]["num_skipped"] for index in range(6)) == 4


def test_sample_of_a_webdataset_without_an_image_is_one_that_cannot_be_read(tmp_path, image_processor):
    path = write_tar(tmp_path / "a.tar", {"0.txt": b"a", "1.png": flat(1), "1.txt": b"b"})
    dataset = DualTokenImageDataset(load_image_dataset(path), image_processor)
    assert sorted(sample["num_skipped"] for sample in (dataset[0], dataset[1])) == [0, 1]


@pytest.mark.parametrize("damage", ["truncated tar", "damaged header", "truncated parquet", "damaged parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_shard_names_itself(tmp_path, damage, streaming):
    kind = damage.split()[1] if damage != "damaged header" else "tar"
    for part in range(3):
        images = [encoded(noise(number)) for number in range(4)]
        if kind == "tar":
            write_tar(tmp_path / f"{part}.tar", {f"{number}.png": image for number, image in enumerate(images)})
        else:
            write_parquet(tmp_path / f"{part}.parquet", images, compression="zstd", data_page_version="1.0")
    broken = tmp_path / f"1.{kind}"
    data = broken.read_bytes()
    if damage == "damaged header":
        with tarfile.open(broken) as tar:
            start = tar.getmembers()[2].offset
        broken.write_bytes(data[:start] + b"x" * 200 + data[start + 200 :])
    elif damage == "damaged parquet":
        broken.write_bytes(data[:4] + b"x" * 500 + data[504:])
    else:
        broken.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"The file '{broken}' cannot be read, it is truncated or damaged"):
        list(load_image_dataset(tmp_path, streaming=streaming))


# Streams


def sources(tmp_path, num_images=23) -> dict[str, datasets.IterableDataset]:
    """Streams of the pictures 0, 1, ... with 1, 3, 5 and 12 shards, read by both ways that `datasets` has."""
    images = [flat(number) for number in range(num_images)]
    per_part = -(-num_images // 5)
    for part in range(5):
        files = {f"{n:03}.png": images[n] for n in range(num_images) if n // per_part == part}
        write_tar(tmp_path / "five" / f"{part}.tar", files)
    write_tar(tmp_path / "one" / "0.tar", {f"{n:03}.png": image for n, image in enumerate(images)})
    rows = datasets.Dataset.from_dict({"image": images})
    return {
        "one tar": load_image_dataset(tmp_path / "one", streaming=True),
        "five tars": load_image_dataset(tmp_path / "five", streaming=True),
        "three arrow shards": rows.to_iterable_dataset(num_shards=3),
        "twelve arrow shards": rows.to_iterable_dataset(num_shards=12),
    }


def stream_of(dataset, image_processor, **options) -> DualTokenImageStream:
    return DualTokenImageStream(dataset, image_processor, **{"shuffle_buffer_size": 4, **options})


def without_state(position: dict) -> dict:
    return {**position, "sources": [{**place, "state": None} for place in position["sources"]]}


def batches(stream, num_workers, count, batch_size=3):
    loader = DataLoader(
        stream,
        batch_size,
        collate_fn=collate_images,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
    )
    return [batch for batch, _ in zip(loader, range(count))]


@pytest.mark.parametrize("source", ["one tar", "five tars", "three arrow shards", "twelve arrow shards"])
def test_an_epoch_is_covered_once_by_ranks_and_workers(tmp_path, image_processor, source):
    dataset = sources(tmp_path)[source]
    for world_size, num_workers in ((1, 0), (3, 0), (2, 2)):
        parts = []
        for rank in range(world_size):
            stream = stream_of(dataset, image_processor, rank=rank, world_size=world_size, repeat=False)
            loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
            parts.append([numbers(sample["pixel_values"][None])[0] for sample in loader])
        assert sorted(sum(parts, [])) == list(range(23)), (world_size, num_workers)
        assert all(parts)


def test_epochs_differ_in_order_and_crop(tmp_path, image_processor):
    def values(seed, count):
        dataset = datasets.Dataset.from_dict({"image": [encoded(noise(n)) for n in range(12)]}).to_iterable_dataset(6)
        stream = iter(stream_of(dataset, image_processor, seed=seed))
        return [next(stream) for _ in range(count)]

    samples = values(0, 24)
    assert [sample["stream_position"]["sources"][0]["epoch"] for sample in samples] == [0] * 12 + [1] * 12
    pixels = [sample["pixel_values"] for sample in samples]
    other = [sample["pixel_values"] for sample in values(1, 12)]
    assert len({tensor.numpy().tobytes() for tensor in pixels + other}) == 36

    def order(tensors):
        clean = [ImagePreparation(image_processor, (1, 1))(noise(n), "") for n in range(12)]
        return [int(torch.stack([(tensor - image).abs().mean() for image in clean]).argmin()) for tensor in tensors]

    orders = [order(pixels[:12]), order(pixels[12:]), order(other)]
    assert all(sorted(numbers) == list(range(12)) for numbers in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def shards_of(images, num_shards) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"image": images}).to_iterable_dataset(num_shards=num_shards)


def test_epochs_differ_in_the_order_of_shards(image_processor):
    """Without the shuffling within blocks; by the seed, too."""
    orders = []
    for seed in (0, 1):
        dataset = shards_of([flat(n) for n in range(16)], 8)
        stream = iter(stream_of(dataset, image_processor, seed=seed, shuffle_buffer_size=1))
        shown = numbers(torch.stack([next(stream)["pixel_values"] for _ in range(48)]))
        for start in (0, 16, 32):
            pairs = list(zip(shown[start : start + 16 : 2], shown[start + 1 : start + 16 : 2]))
            assert sorted(pairs) == [(n, n + 1) for n in range(0, 16, 2)]  # shards are read as they are
            orders.append(tuple(pairs))
    assert len(set(orders)) == 6


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_reader_gets_other_images_in_the_next_epoch(image_processor, num_shards):
    dataset = shards_of([flat(n) for n in range(18)], num_shards)
    parts = {}
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "repeat": True}
        for sample in stream_of(dataset, image_processor, **options):
            epoch = sample["stream_position"]["sources"][0]["epoch"]
            if epoch == 2:
                break
            parts.setdefault((rank, epoch), []).extend(numbers(sample["pixel_values"][None]))
    for epoch in range(2):
        assert sorted(parts[0, epoch] + parts[1, epoch]) == list(range(18))
    for rank in range(2):
        assert set(parts[rank, 0]) != set(parts[rank, 1])


def test_stream_leaves_the_global_generators_alone(tmp_path, image_processor):
    stream = iter(stream_of(sources(tmp_path)["five tars"], image_processor))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for _ in range(6):
        next(stream)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    ("source", "num_workers"),
    [("one tar", 0), ("five tars", 0), ("three arrow shards", 0), ("twelve arrow shards", 0)]
    + [("five tars", 2), ("twelve arrow shards", 2)],
)
def test_resumed_stream_equals_the_uninterrupted_one(tmp_path, image_processor, source, num_workers):
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "seed": 3}
        dataset = sources(tmp_path)[source]
        expected = batches(stream_of(dataset, image_processor, **options), num_workers, 14)
        state = None
        # Stopped twice; every second of a stream, of a block, after an epoch (11 or 12 images of a rank).
        for start, stop in ((0, 1), (1, 4), (4, 14)) if num_workers else zip(range(13), range(1, 14)):
            stream, progress = stream_of(sources(tmp_path)[source], image_processor, **options), StreamProgress()
            if state is not None:
                stream.load_state_dict(state)
                progress.load_state_dict(state)
            for batch, reference in zip(batches(stream, num_workers, stop - start), expected[start:stop]):
                assert torch.equal(batch["pixel_values"], reference["pixel_values"]), (rank, start)
                # How `datasets` writes down its state depends on where it was resumed.
                assert without_state(batch["stream_position"]) == without_state(reference["stream_position"])
                progress.update(batch["stream_position"])
            state = json.loads(json.dumps(progress.state_dict()))
            assert state == progress.state_dict()
        assert expected[-1]["stream_position"]["sources"][0]["epoch"] >= 2


def test_resume_reads_one_block_again(tmp_path, image_processor, monkeypatch):
    """Not the images of all blocks before it."""
    dataset = datasets.Dataset.from_dict({"image": [flat(n) for n in range(40)]}).to_iterable_dataset(num_shards=10)
    stream = stream_of(dataset, image_processor)
    progress = StreamProgress()
    for batch in batches(stream, 0, 11):
        progress.update(batch["stream_position"])
    prepared = []
    prepare = ImagePreparation.__call__
    monkeypatch.setattr(
        ImagePreparation, "__call__", lambda self, value, seed: prepared.append(seed) or prepare(self, value, seed)
    )
    resumed = stream_of(dataset, image_processor)
    resumed.load_state_dict(progress.state_dict())
    next(iter(resumed))
    assert len(prepared) == 1
    assert progress.state_dict()["positions"]["0"]["sources"][0]["block"] == 8


def test_stream_with_unreadable_images_counts_and_resumes(tmp_path, image_processor):
    images = [flat(n) if n % 3 else b"text" for n in range(24)]
    dataset = datasets.Dataset.from_dict({"image": images}).to_iterable_dataset(num_shards=2)
    expected = batches(stream_of(dataset, image_processor), 0, 12, batch_size=4)
    assert sorted(numbers(torch.cat([batch["pixel_values"] for batch in expected[:4]]))) == [
        n for n in range(24) if n % 3
    ]
    # Those before the first readable image of the next epoch count there.
    assert 12 <= sum(int(batch["num_skipped"]) for batch in expected) <= 24
    stream, progress = stream_of(dataset, image_processor), StreamProgress()
    progress.update(expected[4]["stream_position"])
    stream.load_state_dict(progress.state_dict())
    for batch, reference in zip(batches(stream, 0, 7, batch_size=4), expected[5:]):
        assert torch.equal(batch["pixel_values"], reference["pixel_values"])
        assert torch.equal(batch["num_skipped"], reference["num_skipped"])


def test_stream_that_can_give_nothing(tmp_path, image_processor, monkeypatch):
    monkeypatch.setattr("transformers_dualtoken.data.streams.MAX_SKIPPED_IN_A_ROW", 20)
    broken = datasets.Dataset.from_dict({"image": [b"text"] * 3}).to_iterable_dataset()
    with pytest.raises(ValueError, match="20 images of the stream in a row cannot be read. The last is"):
        next(iter(stream_of(broken, image_processor)))
    single = datasets.Dataset.from_dict({"image": [flat(1)]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no image for worker 0 of 1 on rank 1 of 2: it holds fewer images"):
        next(iter(stream_of(single, image_processor, rank=1, world_size=2)))
    assert list(stream_of(single, image_processor, rank=1, world_size=2, repeat=False)) == []


def test_broken_shard_names_itself_in_a_worker(tmp_path, image_processor):
    sources(tmp_path)
    path = tmp_path / "five" / "3.tar"
    path.write_bytes(path.read_bytes()[:700])
    stream = stream_of(load_image_dataset(tmp_path / "five", streaming=True), image_processor)
    iterator = iter(DataLoader(stream, 3, collate_fn=collate_images, num_workers=2))
    with pytest.raises(ValueError, match=f"The file '{path}' cannot be read"):
        list(iterator)
    iterator._shutdown_workers()  # which takes ten seconds if the garbage collector does it


def test_position_of_another_stream_is_refused(tmp_path, image_processor):
    dataset = sources(tmp_path)["five tars"]
    progress = StreamProgress()
    progress.update(batches(stream_of(dataset, image_processor), 0, 1)[0]["stream_position"])
    state = progress.state_dict()
    stream = stream_of(dataset, image_processor)
    stream.load_state_dict({**state, "positions": {"0": {**state["positions"]["0"], "num_workers": 2}}})
    with pytest.raises(ValueError, match="saved with num_workers = 2 and cannot go on with num_workers = 1"):
        next(iter(stream))
    for name, value in (("seed", 1), ("shuffle_buffer_size", 5), ("world_size", 2)):
        with pytest.raises(ValueError, match=f"saved with {name} = . and cannot go on with {name} = {value}"):
            stream_of(dataset, image_processor, **{name: value}).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"saved with num_shards = \[5\] and .* = \[3\]. Resume .*, and with the same data"
    ):
        stream_of(sources(tmp_path)["three arrow shards"], image_processor).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with rank = 0 and cannot go on with rank = 1"):
        stream = stream_of(dataset, image_processor, rank=1, world_size=2)
        stream.load_state_dict({**state, "positions": {"0": {**state["positions"]["0"], "world_size": 2}}})


@pytest.mark.parametrize("options", [{"shuffle_buffer_size": 0}, {"rank": 1}, {"rank": -1}])
def test_settings_of_a_stream_are_checked(image_processor, options):
    dataset = table(noise(0)).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"`{list(options)[0]}` must be"):
        stream_of(dataset, image_processor, **options)


def test_missing_column_of_a_stream_is_named(image_processor):
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image'\]"):
        stream_of(table(noise(0)).to_iterable_dataset(), image_processor, image_column="picture")
    mapped = table(noise(0)).to_iterable_dataset().map(lambda row: {**row, "more": 1})
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image', 'more'\]"):
        stream_of(mapped, image_processor, image_column="picture")


def test_mapped_stream_without_features(image_processor):
    """`datasets` does not know what a function returns; here decoded images."""
    dataset = table(*[Image.open(io.BytesIO(flat(n))) for n in range(8)]).to_iterable_dataset(num_shards=2)
    mapped = dataset.map(lambda row: {**row, "more": 1})
    assert mapped.features is None
    stream = stream_of(mapped, image_processor, repeat=False)
    assert sorted(numbers(torch.stack([sample["pixel_values"] for sample in stream]))) == list(range(8))
    (row, *_) = undecoded(mapped, "image", ["more"])
    assert set(row) == {"image", "more"}


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
