"""Images for training from every kind of source: folders, parquet, webdataset shards, saved data sets, the Hub."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from data_helpers import encoded, first_epoch, flat, loaded_numbers, numbers, table, write_parquet, write_tar
from PIL import Image
from training_helpers import noise

from transformers_dualtoken.data import (
    DualTokenImageDataset,
    DualTokenImageStream,
    files,
    load_image_dataset,
)
from transformers_dualtoken.image_reading import read_image


pytestmark = pytest.mark.usefixtures("own_cache")


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
            keep = [column, "image", column]
            dataset = load_image_dataset(f"{tmp_path}/{source}", streaming=streaming, keep_columns=keep)
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


@pytest.mark.parametrize("row", [{"text": "a"}, {"file_name": 1, "text": "a"}, {"file_name": "a.png", "text": "a"}])
def test_metadata_that_names_no_image(tmp_path, row):
    """Columns of nothing but None would be learned from, or evaluated, without a word."""
    (tmp_path / "0.png").write_bytes(flat(0))
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(
        ValueError, match="None of the 1 images is named in the column `file_name` of .*metadata.jsonl"
    ):
        load_image_dataset(tmp_path, keep_columns=["text"])


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


def test_file_appended_to_a_shard_takes_the_place_of_the_first(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": flat(1), "1.png": flat(2)})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("1.png")
        member.size = len(flat(3))
        tar.addfile(member, io.BytesIO(flat(3)))
    assert (
        loaded_numbers(load_image_dataset(path)) == loaded_numbers(load_image_dataset(path, streaming=True)) == [1, 3]
    )


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

    def load_from_files(source, name=None, **options):
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
    with pytest.raises(ValueError, match="`name` is for data sets on the Hub"):
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
        samples = first_epoch(DualTokenImageStream(plain, image_processor, crop_scale=(1, 1)), 3)
        assert sorted(numbers(sample["pixel_values"][None])[0] for sample in samples) == [1, 3]
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
