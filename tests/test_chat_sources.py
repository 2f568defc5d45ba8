"""Data for unified training: every format from real files, memory-mapped and streamed, and what must be refused."""

import base64
import gzip
import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_helpers import noise

from transformers_dualtoken.data import files
from transformers_dualtoken.data.samples import BadSampleError, ChatSource
from transformers_dualtoken.data.sources import load_chat_sources
from transformers_dualtoken.data.streams import SampleStream
from transformers_dualtoken.image_reading import read_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Rows are copied to the cache of `datasets`: not to the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed, (4, 4)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content) -> Path:
    """Bytes or text as they are, a list as JSON lines, a table as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def only(spec, **kwargs) -> ChatSource:
    (source,) = load_chat_sources(spec, **kwargs)
    return source


def examples(spec, **kwargs) -> list[dict]:
    """The examples of one source: the same from the stream and after pickling, with images that can be read."""
    source = only(spec, **kwargs)
    assert isinstance(source.dataset, datasets.Dataset)
    to_example = pickle.loads(pickle.dumps(source.to_example))
    results = [to_example(row) for row in source.dataset]
    streamed = only(spec, streaming=True, **kwargs)
    assert isinstance(streamed.dataset, datasets.IterableDataset) and streamed.name == source.name
    assert [streamed.to_example(row) for row in streamed.dataset] == results
    for image in images_of(*results):
        assert read_image(image).size == (4, 4)
    return results


def images_of(*results) -> list:
    contents = [
        message["content"]
        for example in results
        for message in example.get("messages", [{"content": example.get("content")}])
    ]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part["image"] for part in parts if part["type"] == "image"]


def refused(spec, match: str, **kwargs) -> BadSampleError:
    """Every row of a source is a bad sample for this reason, in a stream too."""
    for streaming in (False, True):
        source = only(spec, streaming=streaming, **kwargs)
        rows = list(source.dataset)
        assert rows
        for row in rows:
            with pytest.raises(BadSampleError, match=match) as caught:
                source.to_example(row)
    return caught.value


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(value) -> dict:
    return {"type": "image", "image": value}


def chat(question, answer, **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


def test_messages_of_json_lines(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"pictures/{seed}.png", png(seed))
    rows = [
        chat("Hi", "A\u2028B\u0085C", id="first"),
        chat([text("Draw"), image("pictures/0.png")], [image("pictures/1.png"), text("!"), image("pictures/0.png")]),
        chat(
            [
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"},
                }
            ],
            "x",
        ),
        {
            **chat([{"type": "image"}, text("and"), {"type": "image", "text": None}], "same"),
            "images": [f"pictures/{i}.png" for i in (0, 1)],
        },
        {**chat([{"type": "image"}], [image(str(tmp_path / "pictures/1.png"))]), "image": "pictures/0.png", "id": 7},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ]
    paths = [str(tmp_path / f"pictures/{seed}.png") for seed in (0, 1)]
    results = examples(write(tmp_path / "chats.jsonl", rows))
    assert results == [
        chat("Hi", "A\u2028B\u0085C", id="first"),
        chat([text("Draw"), image(paths[0])], [image(paths[1]), text("!"), image(paths[0])], id="chats.jsonl:2"),
        chat([image({"bytes": png(0), "path": None})], "x", id="chats.jsonl:3"),
        chat([image(paths[0]), text("and"), image(paths[1])], "same", id="chats.jsonl:4"),
        chat([image(paths[0])], [image(paths[1])], id="7"),
        chat("a", "b", id="chats.jsonl:6"),
    ]
    # Blank lines, Windows' line ends and a byte order mark are no rows of their own.
    lines = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in rows) + "\r\n"
    for name in ("windows.jsonl", "windows.json"):
        again = examples(write(tmp_path / name, lines))
        assert [row["messages"] for row in again] == [row["messages"] for row in results]
    assert again[1]["id"] == "windows.json:3"
    packed = write(tmp_path / "packed.jsonl.gz", gzip.compress(lines.encode()))
    assert [row["messages"] for row in examples(packed)] == [row["messages"] for row in results]


def test_image_folder_is_the_base_of_relative_paths(tmp_path):
    write(tmp_path / "elsewhere/a.png", png(0))
    path = write(tmp_path / "chats.jsonl", [chat([image("a.png")], "x")])
    (example,) = examples({"path": path, "image_folder": tmp_path / "elsewhere"})
    assert images_of(example) == [str(tmp_path / "elsewhere/a.png")]
    (url,) = only({"path": path, "image_folder": "https://example.org/images/"}).dataset
    source = only({"path": path, "image_folder": "https://example.org/images/"})
    assert images_of(source.to_example(url)) == ["https://example.org/images/a.png"]
    error = refused(path, re.escape(f"the image file {str(tmp_path / 'a.png')!r} does not exist"))
    assert error.sample_id == "chats.jsonl:1"
    with pytest.raises(ValueError, match="'.*nowhere' .* is not a folder"):
        load_chat_sources({"path": path, "image_folder": tmp_path / "nowhere"})


@pytest.mark.parametrize("with_metadata", [False, True])
def test_messages_of_parquet(tmp_path, with_metadata):
    """Images nested in parts and in a list: as plain structs, and as the features of `datasets`."""
    embedded = {"bytes": png(0), "path": None}
    parts = [[{"type": "image", "text": None, "image": embedded}, {"type": "text", "text": "What?", "image": None}]]
    rows = {
        "messages": [
            [
                {"role": "user", "content": parts[0]},
                {"role": "assistant", "content": [{"type": "text", "text": "X", "image": None}]},
            ]
        ]
        * 2,
        "unused": [embedded] * 2,
    }
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    features = {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features | {"unused": datasets.Image()}))
    table = dataset.data.table if with_metadata else dataset.data.table.replace_schema_metadata(None)
    path = write(tmp_path / "a.parquet", table)
    results = examples(path)
    assert results == [chat([image(embedded), text("What?")], [text("X")])] * 2
    assert only(path).dataset.column_names == ["messages"]
    # The same as it is saved, and with the images in a column of lists.
    dataset.save_to_disk(tmp_path / "saved")
    assert examples(tmp_path / "saved") == results

    placeholder = chat(
        [{"type": "image", "text": None}, {"type": "text", "text": "What?"}], [{"type": "text", "text": "X"}]
    )
    dataset = datasets.Dataset.from_dict(
        {"messages": [placeholder["messages"]], "images": [[embedded]]},
        features=datasets.Features(
            {
                "messages": datasets.List(
                    {
                        "role": datasets.Value("string"),
                        "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                    }
                ),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )
    table = dataset.data.table if with_metadata else dataset.data.table.replace_schema_metadata(None)
    assert examples(write(tmp_path / "b.parquet", table)) == results[:1]


def test_saved_images_in_lists_are_not_copied(tmp_path):
    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string")), "images": datasets.List(datasets.Image())}
    )
    rows = {"texts": [["a", None]], "images": [[None, {"bytes": png(1), "path": None}]]}
    datasets.DatasetDict(validation=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(
        tmp_path / "saved"
    )
    assert examples(tmp_path / "saved", split="validation") == [
        {"content": [text("a"), image({"bytes": png(1), "path": None})]}
    ]
    saved = datasets.load_from_disk(tmp_path / "saved")["validation"]
    assert only({"path": tmp_path / "saved", "split": "validation"}).dataset.cache_files == saved.cache_files
    with pytest.raises(ValueError, match="no split 'train'"):
        load_chat_sources(tmp_path / "saved")


def test_dicts_of_lists_are_lists_of_dicts(tmp_path):
    """As older data sets store them."""
    table = pa.table({"conversations": [{"from": ["human", "gpt"], "value": ["a", "b"]}]})
    assert examples(write(tmp_path / "a.parquet", table)) == [chat("a", "b")]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": []}, "it has no messages"),
        ({"messages": None}, "it has no messages"),
        ({"messages": "Hi"}, "must be a list"),
        ({"messages": [chat("a", "b")["messages"]]}, "list of conversations"),
        ({"messages": [{"content": "a"}]}, "must be a dict with a 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a message must be"),
        (chat([{"type": "video"}], "x"), "part of type 'video'"),
        (chat([{"type": "image"}], "x"), "0 x image$"),
        ({**chat([{"type": "image"}], "x"), "images": ["a.png", "a.png"]}, "1 x image part without data, 2 x image$"),
        ({**chat("no placeholder", "x"), "image": "a.png"}, "0 x image part without data, 1 x image$"),
        ({**chat([{"type": "image"}], "x"), "images": [None]}, "image 1 of the 1 in 'images' is missing"),
        ({**chat([{"type": "image", "index": 1}], "x"), "images": ["a.png"]}, "number 1, out of order"),
        (chat([image("gone.png")], "x"), "the image file .*gone.png' does not exist"),
        (chat([image("")], "x"), "path of an image is empty"),
        (chat([image(7)], "x"), "got int"),
        (chat([{"type": "image", "base64": "%"}], "x"), "base64"),
        (chat([{"type": "image", "url": "data:image/png;base64,%"}], "x"), "base64"),
        (chat([{"type": "image", "pixel_codes": [[[1]]]}], "x"), "only pixel_codes of pixel_codes and semantic_codes"),
        ([1], "must be a JSON object, got list"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_chats_are_refused(tmp_path, row, match):
    write(tmp_path / "a.png", png(0))
    line = row if isinstance(row, str) else json.dumps(row)
    path = write(tmp_path / "bad.jsonl", json.dumps(chat("good", "one")) + "\n" + line + "\n")
    for streaming in (False, True):
        source = only(path, streaming=streaming)
        good, bad = source.dataset
        source.to_example(good)
        with pytest.raises(BadSampleError, match=match) as caught:
            source.to_example(bad)
        assert caught.value.sample_id == "bad.jsonl:2"


GOOD_AND_INCOMPLETE = {
    "messages": (chat("a", "b"), {"id": "x"}),
    "llava": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"image": None}),
    "caption": ({"image": "a.png", "text": "a"}, {"text": "a"}),
    "edit": ({"input_image": "a.png", "edited_image": "a.png", "instruction": "i"}, {"instruction": "i"}),
    "text": ({"text": "a"}, {"url": "b"}),
    "interleaved": ({"content": [{"type": "text", "text": "a"}]}, {"url": "b"}),
}


@pytest.mark.parametrize("name", GOOD_AND_INCOMPLETE)
@pytest.mark.parametrize("layout", ["lines", "other file", "tar", "parquet", "array"])
def test_an_incomplete_first_row_is_one_bad_sample(tmp_path, name, layout):
    """Whether the format is told or named."""
    good, bad = GOOD_AND_INCOMPLETE[name]
    folder = tmp_path / "data"
    write(folder / "a.png", png(0))
    rows = [bad, good, good]
    if layout == "lines":
        write(folder / "metadata.jsonl", ["no object", *rows])
    elif layout == "array":
        write(folder / "a.json", json.dumps(rows))
    elif layout == "other file":
        write(folder / "0.jsonl", [bad])
        write(folder / "1.jsonl", [good, good])
    elif layout == "parquet":
        write(folder / "0.parquet", pa.Table.from_pylist([{"url": None, **bad}]))
        write(folder / "1.parquet", pa.Table.from_pylist([good, good]))
    else:
        files = {}
        for number, row in enumerate(rows):
            images = {key: value for key, value in row.items() if value == "a.png"}
            files |= {f"{number}.{key}.png": png(0) for key in images}
            files[f"{number}.json"] = json.dumps({key: row[key] for key in row if key not in images}).encode()
        write_tar(folder / "0.tar", files)
    for spec in ({"path": folder}, {"path": folder, "format": name}):
        for streaming in (False, True):
            source = only(spec, streaming=streaming)
            assert source.to_example.format == name
            kept = 0
            for row in source.dataset:
                try:
                    kept += bool(source.to_example(row))
                except BadSampleError:
                    continue
            assert kept == 2


def test_the_columns_of_most_rows_are_taken(tmp_path):
    write(tmp_path / "a.png", png(0))
    rows = [{"image": "a.png", "text": "t"}] * 5
    source = only(write(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "c"}, *rows]))
    assert source.to_example.options["caption_column"] == "text"
    # An image that a few rows lack is not left out of the others.
    source = only(write(tmp_path / "b.jsonl", [{"text": "t"}] * 5 + rows[:1]))
    assert source.to_example.format == "caption"


@pytest.mark.parametrize("name", ["imagefolder", "text", "json", "csv", "parquet", "webdataset", "audiofolder"])
def test_readers_of_datasets_are_no_data_sets_of_the_hub(tmp_path, monkeypatch, name):
    write(tmp_path / "a.txt", "secret")
    write(tmp_path / "a.png", png(0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"There is no file or folder at '{name}' .*{name}' is no data set of the Hub"
    ):
        load_chat_sources(name)


def test_bytes_that_are_no_text_make_one_bad_sample(tmp_path):
    good = json.dumps(chat("a", "b")).encode()
    for name, content in {
        "a.jsonl": good + b'\n{"messages": "\xff"}\n',
        "a.json": b"[" + good + b', {"messages": "\xff"}]',
    }.items():
        source = only(write(tmp_path / name, content))
        first, second = source.dataset
        assert source.to_example(first)["messages"] == chat("a", "b")["messages"]
        with pytest.raises(BadSampleError, match="not valid JSON"):
            source.to_example(second)


def test_codes_in_messages(tmp_path):
    codes = {"pixel_codes": [[[1, 2]]], "semantic_codes": [[[3, 4]]]}
    source = only(write(tmp_path / "a.jsonl", [chat("Draw", [{"type": "image", **codes}])]))
    part = source.to_example(source.dataset[0])["messages"][1]["content"][0]
    assert part.keys() == {"type", *codes}
    assert all(np.array_equal(part[key], codes[key]) for key in codes)


LLAVA_ROWS = [
    {
        "id": "000",
        "image": "coco/a.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat\nis it?"},
            {"from": "gpt", "value": "Noise"},
        ],
    },
    {
        "id": "001",
        "image": ["coco/a.png", "coco/b.png", "coco/a.png"],
        "conversations": [
            {"from": "human", "value": "Compare <image> and\n<image>"},
            {"from": "gpt", "value": "Here:\n<image>\n"},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]


@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "parquet"])
def test_llava(tmp_path, layout):
    for seed, name in enumerate("ab"):
        write(tmp_path / f"coco/{name}.png", png(seed))
    a, b = (image(str(tmp_path / f"coco/{name}.png")) for name in "ab")
    if layout == "parquet":
        rows = [
            {**row, "image": None if "image" not in row else [row["image"]] if index == 0 else row["image"]}
            for index, row in enumerate(LLAVA_ROWS)
        ]
        path = write(tmp_path / "llava.parquet", pa.Table.from_pylist(rows))
    elif layout == "lines":
        path = write(tmp_path / "llava.jsonl", LLAVA_ROWS)
    else:
        path = write(tmp_path / "llava.json", json.dumps(LLAVA_ROWS, indent=2 if layout != "array" else None))
    first, second, third = examples(path)
    assert first == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [a, text("What\nis it?")]},
            {"role": "assistant", "content": "Noise"},
        ],
        "id": "000",
    }
    assert second == chat([text("Compare "), a, text(" and"), b], [text("Here:"), a], id="001")
    assert third["messages"] == chat("Hi", "Ho")["messages"]
    assert third.get("id") == (None if layout == "parquet" else f"{path.name}:3")


@pytest.mark.parametrize(
    ("values", "picture", "match"),
    [
        (["What?", "x"], "a.png", "0 x <image>, 1 x image$"),
        (["<image>What?", "x"], None, "1 x <image>, 0 x image$"),
        (["<image>", "<image>"], ["a.png"], "2 x <image>, 1 x image$"),
        ([3, "x"], None, "a string as 'value'"),
    ],
)
def test_bad_llava_rows_are_refused(tmp_path, values, picture, match):
    write(tmp_path / "a.png", png(0))
    turns = [{"from": speaker, "value": value} for speaker, value in zip(("human", "gpt"), values)]
    refused(write(tmp_path / "a.json", json.dumps([{"image": picture, "conversations": turns}])), match)


def test_what_stands_beside_a_llava_turn_is_kept(tmp_path):
    turns = [
        {"from": "human", "value": "a", "weight": None},
        {"from": "gpt", "value": "b", "weight": 0.0, "think": "c"},
    ]
    (example,) = examples(write(tmp_path / "a.jsonl", [{"conversations": turns, "tools": '[{"name": "d"}]'}]))
    assert example["messages"][1] == {"role": "assistant", "content": "b", "weight": 0.0, "think": "c"}
    assert example["messages"][0] == {"role": "user", "content": "a"} and example["tools"] == [{"name": "d"}]


def test_a_system_column_is_the_first_message(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "Be short."}
    for name, row in (("conversations", turns), ("messages", messages)):
        (example,) = examples(write(tmp_path / f"{name}.jsonl", [{name: row, "system": "Be short."}]))
        assert example["messages"] == [system, *messages]
        (example,) = examples(write(tmp_path / f"{name}.jsonl", [{name: row, "system": ""}]))
        assert example["messages"] == messages
    refused(write(tmp_path / "c.jsonl", [{"messages": [system, *messages], "system": "x"}]), "a system prompt twice")
    refused(write(tmp_path / "d.jsonl", [{"messages": messages, "system": ["x"]}]), "'system' must be a string")


def test_llava_roles_and_turns_are_checked(tmp_path):
    refused(
        write(tmp_path / "a.jsonl", [{"conversations": [{"from": "robot", "value": "x"}]}]), "'from' of human, gpt"
    )
    refused(write(tmp_path / "b.jsonl", [{"conversations": []}]), "no messages")
    refused(write(tmp_path / "c.jsonl", [{"conversations": "x"}]), "must be a list, got str")


def test_json_arrays_are_read_item_by_item(tmp_path, monkeypatch):
    """Items larger and smaller than what is read at once, up to every seam between two reads."""
    rows = [{"text": "x" * size, "n": [1, {"]": '"'}]} for size in (1, 200_000, 5, 65_000, 30)]
    for padding in range(65_520, 65_540):
        content = " [" + json.dumps({"text": "p" * padding}) + " ,\n" + json.dumps(rows)[1:]
        path = write(tmp_path / "a.json", content)
        found = [json.loads(row["line"]) for row in files.iterate_rows([str(path)], "json")]
        assert found == [{"text": "p" * padding}, *rows]
        number = write(tmp_path / "b.json", json.dumps([{"text": "p" * padding}, 1234567]))
        assert [row["line"] for row in files.iterate_rows([str(number)], "json")][1:] == [b"1234567"]
    assert [row["number"] for row in files.iterate_rows([str(path)], "json")] == [1, 2, 3, 4, 5, 6]
    for end in (-1, -20, -40_000, 70_000):
        write(path, content[:end])
        with pytest.raises(ValueError, match="a.json' is truncated or damaged at item [2-7] "):
            load_chat_sources(path)


CAPTIONS = {"a": "a {red} square", "b": "two\ncats"}


def caption_layouts(folder: Path) -> dict[str, object]:
    """The same two captioned images in every layout: name -> source."""
    images = {name: png(seed) for seed, name in enumerate(CAPTIONS)}
    for name, data in images.items():
        write(folder / f"images/train/{name}.png", data)
        write(folder / f"csv/{name}.png", data)
        write(folder / f"table/{name}.png", data)
    names = list(CAPTIONS)
    write(
        folder / "images/train/metadata.jsonl",
        [{"file_name": f"{name}.png", "text": CAPTIONS[name]} for name in names],
    )
    write(folder / "images/test/metadata.jsonl", [{"file_name": "gone.png", "text": "not read"}])
    write(
        folder / "csv/metadata.csv",
        "file_name,caption\n" + "".join(f'{name}.png,"{CAPTIONS[name]}"\n' for name in names),
    )
    write(
        folder / "table/metadata.parquet",
        pa.table({"file_name": [f"{name}.png" for name in names], "text": list(CAPTIONS.values())}),
    )
    write_tar(
        folder / "shards/0.tar", {"x/a.jpg": images["a"], "x/a.txt": (CAPTIONS["a"] + "\n").encode(), "x/a.cls": b"3"}
    )
    write_tar(
        folder / "shards/1.tar",
        {
            "x/b.json": json.dumps({"caption": "no", "other": None}).encode(),
            "x/b.txt": CAPTIONS["b"].encode(),
            "x/b.png": images["b"],
        },
    )
    write_tar(
        folder / "json/train-0.tar",
        {
            f"{name}.{key}": data
            for name in names
            for key, data in (
                ("webp", images[name]),
                ("json", json.dumps({"caption": CAPTIONS[name], "width": name == "a" or "wide"}).encode()),
            )
        },
    )
    for name in names:
        write(
            folder / f"parquet/{name}.parquet",
            pa.table({"image": [{"bytes": images[name], "path": f"{name}.png"}], "caption": [CAPTIONS[name]]}),
        )
    write(folder / "bytes/x.parquet", pa.table({"jpg": list(images.values()), "blurb": list(CAPTIONS.values())}))
    return {
        "images": folder / "images",
        "csv": folder / "csv",
        "table": folder / "table",
        "shards": {"path": folder / "shards", "caption_column": "txt"},
        "json": f"{folder}/json/*.tar",
        "parquet": f"{folder}/parquet/*.parquet",
        "bytes": {"path": folder / "bytes", "format": "caption", "caption_column": "blurb"},
    }


@pytest.mark.parametrize("layout", ["images", "csv", "table", "shards", "json", "parquet", "bytes"])
def test_captions(tmp_path, layout):
    source = caption_layouts(tmp_path)[layout]
    source = source if isinstance(source, dict) else {"path": source}
    drawn = examples(source)
    assert [example["messages"][0]["content"] for example in drawn] == list(CAPTIONS.values())
    answers = [example["messages"][1]["content"] for example in drawn]
    assert [[part["type"] for part in answer] for answer in answers] == [["image"]] * 2
    for seed, value in enumerate(images_of(*drawn)):
        assert np.array_equal(np.asarray(read_image(value)), np.asarray(noise(seed, (4, 4))))

    options = {"draw_prompt": "Draw {caption} {now}.", "describe_prompt": "Say it."}
    draw, describe = load_chat_sources({**source, "task": "both", "weight": 3, **options})
    assert (draw.weight, describe.weight) == (1.5, 1.5) and draw.dataset is describe.dataset
    assert draw.name.endswith(" (draw)") and describe.name.endswith(" (describe)")
    row = draw.dataset[0]
    assert draw.to_example(row)["messages"][0]["content"] == "Draw a {red} square {now}."
    messages = describe.to_example(row)["messages"]
    assert messages[0]["content"] == [answers[0][0], text("Say it.")] and messages[1]["content"] == CAPTIONS["a"]


def test_names_of_caption_samples(tmp_path):
    layouts = caption_layouts(tmp_path)
    assert [example["id"] for example in examples(layouts["shards"])] == ["x/a", "x/b"]
    assert [example["id"] for example in examples(layouts["images"])] == ["metadata.jsonl:1", "metadata.jsonl:2"]


def test_bad_captions_are_refused(tmp_path):
    write(tmp_path / "a.png", png(0))
    refused(write(tmp_path / "a.jsonl", [{"image": "a.png", "caption": " "}]), "'caption' must be a string")
    refused(write(tmp_path / "b.jsonl", [{"image": "a.png", "caption": 7}]), "'caption' must be a string")
    refused(write(tmp_path / "c.jsonl", [{"image": None, "caption": "x"}]), "an image is missing")
    source = only(
        write_tar(
            tmp_path / "d.tar",
            {
                "0.jpg": png(0),
                "0.txt": b"x",
                "1.jpg": png(0),
                "1.png": png(0),
                "2.txt": b"x",
                "3.jpg": png(0),
                "3.txt": b"\xff",
                "4.jpg": png(0),
                "4.json": b"{",
                "5.jpg": png(0),
            },
        )
    )
    good, *bad = source.dataset
    source.to_example(good)
    for row, match in zip(
        bad,
        ["two files for the column 'image'", "image is missing", "no UTF-8", "'json' is not valid", "got None"],
        strict=True,
    ):
        with pytest.raises(BadSampleError, match=match) as caught:
            source.to_example(row)
        assert caught.value.sample_id == row["key"]


def test_edits(tmp_path):
    write(tmp_path / "lines/a.png", png(0))
    write(tmp_path / "lines/b.png", png(1))
    lines = [{"input_image": "a.png", "edit_prompt": "Make it blue", "edited_image": "b.png"}]
    (example,) = examples(write(tmp_path / "lines/edits.jsonl", lines))
    paths = [str(tmp_path / f"lines/{name}.png") for name in "ab"]
    assert example == chat([image(paths[0]), text("Make it blue")], [image(paths[1])], id="edits.jsonl:1")

    before, after = ({"bytes": png(seed), "path": None} for seed in (0, 1))
    expected = chat([image(before), text("Make it blue")], [image(after)])
    for source, instruction, edited in (
        ("original_image", "edit_prompt", "edited_image"),
        ("src_img", "edited_prompt_list", "edited_img"),
        ("image", "prompt", "target_image"),
    ):
        value = ["Make it blue", "Blue it"] if instruction.endswith("list") else "Make it blue"
        table = pa.table({"original_prompt": ["x"], source: [before], instruction: [value], edited: [after]})
        assert examples(write(tmp_path / f"{source}.parquet", table)) == [expected]
    table = pa.table({"one": [before], "two": ["Make it blue"], "three": [after]})
    columns = {"format": "edit", "input_column": "one", "instruction_column": "two", "edited_column": "three"}
    assert examples({"path": write(tmp_path / "own.parquet", table), **columns}) == [expected]
    shard = write_tar(
        tmp_path / "e.tar",
        {"k.input_image.png": png(0), "k.instruction.txt": b"Make it blue", "k.edited_image.png": png(1)},
    )
    (example,) = examples(shard)
    assert [image["bytes"] for image in images_of(example)] == [png(0), png(1)]
    assert images_of(example)[1]["path"] == f"{shard}/k.edited_image.png"


def test_plain_text(tmp_path):
    assert examples(write(tmp_path / "a.jsonl", [{"text": "x\n\u2028y"}])) == [
        {"content": "x\n\u2028y", "id": "a.jsonl:1"}
    ]
    assert examples(write(tmp_path / "a.parquet", pa.table({"text": ["x"], "url": ["y"]}))) == [{"content": "x"}]
    write(tmp_path / "books/1.txt", "One.\n\nTwo\u2028still two.\n")
    write(tmp_path / "books/2.txt", "Three.")
    documents = [{"content": "One.\n\nTwo\u2028still two.\n", "id": "1.txt:1"}, {"content": "Three.", "id": "2.txt:1"}]
    assert examples(tmp_path / "books") == documents
    lines = examples({"path": f"{tmp_path}/books/*.txt", "sample_by": "line"})
    assert [row["content"] for row in lines] == ["One.", "Two\u2028still two.", "Three."]
    assert [row["id"] for row in lines] == ["1.txt:1", "1.txt:3", "2.txt:1"]
    own = {"path": write(tmp_path / "own.jsonl", [{"body": "x"}]), "format": "text", "text_column": "body"}
    assert [row["content"] for row in examples(own)] == ["x"]
    refused(write(tmp_path / "empty.jsonl", [{"text": " "}, {"text": None}, {"text": 3}]), "'text' must be a string")
    refused(write(tmp_path / "empty.txt", b""), "'text' must be a string")


def test_interleaved_documents(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"{seed}.png", png(seed))
    rows = [
        {"images": ["0.png", None, "1.png", None], "texts": [None, "between", "", "after"]},
        {"content": [text("See "), image("0.png"), {"type": "image"}], "images": ["1.png"]},
        {"content": "only text"},
    ]
    paths = [image(str(tmp_path / f"{seed}.png")) for seed in (0, 1)]
    results = examples(write(tmp_path / "docs.jsonl", rows))
    assert [row["content"] for row in results] == [
        [paths[0], text("between"), paths[1], text("after")],
        [text("See "), *paths],
        "only text",
    ]
    value = {"bytes": png(0), "path": None}
    table = pa.table({"images": [[None, value]], "texts": [["a", None]], "metadata": ["x"]})
    assert examples(write(tmp_path / "obelics.parquet", table)) == [{"content": [text("a"), image(value)]}]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"images": ["0.png"], "texts": ["a"]}, "entry 0 is both"),
        ({"images": [None], "texts": [None]}, "entry 0 is neither"),
        ({"images": [None, None], "texts": ["a"]}, "lists of one length, got 1 and 2"),
        ({"images": None, "texts": ["a"]}, "got 1 and NoneType"),
        ({"images": [], "texts": []}, "the document is empty"),
        ({"images": [None], "texts": [{"user": "q"}]}, "neither a text"),
        ({"content": ""}, "the document is empty"),
        ({"content": [{"type": "image"}]}, "1 x image part without data, 0 x image"),
        ({"content": [image("gone.png")]}, "does not exist"),
    ],
)
def test_bad_documents_are_refused(tmp_path, row, match):
    refused(write(tmp_path / "a.jsonl", [row]), match)


def test_code_folders_are_handed_on(tmp_path, monkeypatch):
    from transformers_dualtoken.data import sources as chat_sources

    write(tmp_path / "codes/dualtoken_codes.json", "{}")
    calls = []

    def load_code_source(path, **kwargs):
        calls.append((path, kwargs))
        return ChatSource("codes", None, None, kwargs["weight"])

    monkeypatch.setattr(chat_sources, "load_code_source", load_code_source)
    texts = write(tmp_path / "a.jsonl", [{"text": "x"}])
    mixture = [{"path": tmp_path / "codes", "weight": 2}, {"path": texts, "weight": 1}]
    sources = load_chat_sources(mixture, streaming=True, fingerprint="abc")
    assert calls == [(str(tmp_path / "codes"), {"weight": 2, "streaming": True, "fingerprint": "abc"})]
    assert [(source.name, source.weight) for source in sources] == [("codes", 2), ("a.jsonl", 1)]
    with pytest.raises(ValueError, match="holds precomputed codes: its format is 'codes', not 'text'"):
        load_chat_sources({"path": tmp_path / "codes", "format": "text"})


@pytest.mark.parametrize("ending", ["json", "yaml"])
@pytest.mark.parametrize("key", [None, "sources"])
def test_mixture_files(tmp_path, ending, key, monkeypatch):
    write(tmp_path / "data/part/a.jsonl", [{"text": "x"}])
    write(tmp_path / "data/part/b.jsonl", [{"text": "y"}])
    write(tmp_path / "data/other/a.jsonl", [chat([image("a.png")], "z")])
    write(tmp_path / "data/pictures/a.png", png(0))
    specs = [
        {"path": "part/*.jsonl", "weight": 0.5},
        {"path": "other/a.jsonl", "weight": 2, "image_folder": "pictures"},
        {"path": str(tmp_path / "data/part/a.jsonl"), "weight": 1},
    ]
    if ending == "json":
        content = json.dumps(specs if key is None else {key: specs})
    else:
        lines = [
            f"- {{path: {json.dumps(spec['path'])}, weight: {spec['weight']}"
            + (", image_folder: pictures}" if "image_folder" in spec else "}")
            for spec in specs
        ]
        content = "\n".join(lines if key is None else ["sources:", *lines])
    path = write(tmp_path / f"data/mixture.{ending}", content)
    monkeypatch.chdir(tmp_path)
    for given in (path, f"data/mixture.{ending}"):
        sources = load_chat_sources(given)
        assert [source.weight for source in sources] == [0.5, 2, 1]
        assert [source.name for source in sources] == ["part/*.jsonl", "a.jsonl", "a.jsonl #2"]
        rows = [source.to_example(row) for source in sources for row in source.dataset]
        assert [row.get("content") for row in rows] == ["x", "y", None, "x"]
        assert [Path(value).resolve() for value in images_of(rows[2])] == [tmp_path / "data/pictures/a.png"]


def test_names_of_the_hub_in_mixture_files(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming, data_files=None):
        asked.append((name, config, split, streaming))
        features = datasets.Features(
            {
                "__key__": datasets.Value("string"),
                "jpg": datasets.Image(),
                "json": {"caption": datasets.Value("string")},
            }
        )
        dataset = datasets.Dataset.from_dict(
            {"__key__": ["k"], "jpg": [{"bytes": png(0), "path": None}], "json": [{"caption": "c"}]}, features=features
        )
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr("transformers_dualtoken.data.files.datasets.load_dataset", load_dataset)
    path = write(tmp_path / "m.yaml", "- {path: someone/pairs, name: small, split: test}\n")
    assert examples(path) == [chat("c", [image({"bytes": png(0), "path": None})], id="k")]
    assert asked == [("someone/pairs", "small", "test", False), ("someone/pairs", "small", "test", True)]
    assert only(path).name == "someone/pairs"


def test_specs_are_checked(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [{"text": "x"}]))
    for spec, match in [
        ([], "at least one source"),
        ({"format": "text"}, "with a 'path'"),
        ([3], "with a 'path'"),
        ({"path": path, "wieght": 1}, "unknown keys wieght; the keys are path, format, weight"),
        (
            {"path": path, "task": "draw"},
            "unknown keys task; the keys of the format 'text' are path.*text_column, sample_by",
        ),
        ({"path": path, "format": "texts"}, "must be one of messages, llava, caption, edit, text, interleaved, codes"),
        ({"path": path, "format": "caption", "task": "paint"}, "`task` .* must be one of draw, describe, both"),
        ({"path": path, "format": "caption", "draw_prompt": "Draw."}, "'{caption}'"),
        (
            {"path": path, "format": "caption"},
            r"lacks a column; it has \['text'\], and needs image_column: image or jpg",
        ),
        ({"path": path, "format": "messages"}, "lacks a column; .* needs one of messages, prompt"),
        ({"path": path, "text_column": "body"}, "text_column: body"),
        ({"path": path, "sample_by": "word"}, "`sample_by` .* must be one of document, line"),
        ({"path": path, "name": "small"}, "`name` and `data_files` are for data sets on the Hub"),
        ({"path": path, "weight": 0}, "must be a finite number above 0"),
        ({"path": path, "weight": True}, "must be a finite number above 0"),
        ([{"path": path, "weight": 1}, path], "Either all sources of a mixture have a weight or none"),
        ({"sources": [path], "split": "x"}, r"nothing else; it has also \['split'\]"),
        (str(tmp_path / "gone.jsonl"), "no file or folder at"),
        (str(tmp_path / "gone/*.jsonl"), "holds no files"),
        (str(write(tmp_path / "unknown.jsonl", [{"x": 1}])), r"cannot be told from its columns \['x'\]"),
        (str(write(tmp_path / "broken.jsonl", "{\n{\n")), "None of the first .* The last: the row is not valid JSON"),
        (str(write(tmp_path / "empty.jsonl", "\n")), "There are no rows"),
        (str(write(tmp_path / "m.yaml", "a: 1")), "must be a list of sources"),
        (str(write(tmp_path / "n.yaml", "[1")), "n.yaml' cannot be read"),
        (str(write(tmp_path / "cut.parquet", b"PAR1")), "cut.parquet' .*cannot be read"),
        (
            str(write(tmp_path / "cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-9])),
            "cut.jsonl.gz' cannot be read",
        ),
        (str(write(tmp_path / "cut.tar", b"abc")), "cut.tar' cannot be read"),
    ]:
        with pytest.raises(ValueError, match=match):
            load_chat_sources(spec)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ([], "at least one source"),
        ({"sources": []}, "at least one source"),
        ({"sources": None}, "A source of data is a path, or a dict with a 'path', got None"),
        ([["a.jsonl"]], "A source of data is a path, or a dict"),
        ({"sources": ["a.jsonl"], "weights": [1], 3: 4}, "it has also .'weights', 3."),
        ({"path": 3}, "A source of data is a path"),
        ({"path": ""}, "no file or folder at ''"),
        ({"path": "a.jsonl", 3: 4}, "The keys of a source must be strings"),
        ({"path": "a.jsonl", "format": []}, "format of 'a.jsonl' must be one of messages, .*, got .."),
        ({"path": "a.jsonl", "task": ["draw"]}, "`task` of 'a.jsonl' must be a string"),
        ({"path": "a.jsonl", "draw_prompt": 3}, "`draw_prompt` of 'a.jsonl' must be a string, got 3"),
        ({"path": "a.jsonl", "image_folder": 3}, "`image_folder` of 'a.jsonl' must be a string"),
        ({"path": "a.jsonl", "split": 1.5}, "`split` of 'a.jsonl' must be a string"),
        *(
            ({"path": "a.jsonl", "weight": weight}, "The weight of 'a.jsonl .1.' must be a finite number above 0")
            for weight in (0, -1, -0.0, float("nan"), float("inf"), "2", True, [1], {})
        ),
        ([{"path": "a.jsonl", "weight": 1e308}] * 2, "The sum of the weights must be finite"),
        ([{"path": "a.jsonl", "weight": 1}, "a.jsonl"], "without one are .'a.jsonl .2.'."),
    ],
)
def test_odd_mixtures_are_named(tmp_path, monkeypatch, spec, match):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match):
        load_chat_sources(spec)


def test_a_path_may_come_twice(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [{"text": "a"}]))
    sources = load_chat_sources([{"path": path, "weight": 1}, {"path": path, "weight": 2}])
    assert len({source.name for source in sources}) == 2


def test_files_of_folders(tmp_path):
    write(tmp_path / "f/data.jsonl", [{"text": "x"}])
    write(tmp_path / "f/README.txt", "not data")
    write(tmp_path / "f/.hidden.parquet", b"")
    write(tmp_path / "f/dataset_infos.json", "{}")
    write(tmp_path / "f/validation/data.jsonl", [{"text": "y"}])
    assert [row["content"] for row in examples(tmp_path / "f")] == ["x"]
    assert [row["content"] for row in examples(tmp_path / "f", split="val")] == ["y"]
    assert [row["content"] for row in examples({"path": tmp_path / "f", "split": "validation"})] == ["y"]
    with pytest.raises(ValueError, match="no split 'test'"):
        load_chat_sources(tmp_path / "f", split="test")
    write(tmp_path / "f/more.csv", "text\nz\n")
    with pytest.raises(ValueError, match="holds 1 csv files, 2 json files. Give a pattern"):
        load_chat_sources(tmp_path / "f")
    write(tmp_path / "pairs/a.png", png(0))
    write(tmp_path / "pairs/a.txt", "its caption")
    with pytest.raises(ValueError, match="text .* without images"):
        load_chat_sources(tmp_path / "pairs")


def test_changed_files_are_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}])
    assert examples(path)[0]["content"] == "x"
    write(path, [{"text": "y"}])  # as large as it was
    os.utime(path, (1, 1))
    assert examples(path)[0]["content"] == "y"


def test_cut_shards_are_named(tmp_path):
    """Also where the cut leaves whole samples, at which `tarfile` just stops."""
    path = write_tar(tmp_path / "a.tar", {f"{index}.txt": b"x" for index in range(3)})
    for end in (3 * 1024, 2 * 1024 + 520, 2 * 1024 + 100):
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(ValueError, match="a.tar' cannot be read"):
            load_chat_sources({"path": path, "format": "text", "text_column": "txt"})
        source = only({"path": path, "format": "text", "text_column": "txt"}, streaming=True)
        with pytest.raises(ValueError, match="a.tar' cannot be read"):
            list(source.dataset)


class Texts(SampleStream):
    noun = "sample"

    def __init__(self, source, **kwargs):
        super().__init__([source.dataset], **kwargs)
        self.source = source

    def prepare(self, source, row, key):
        return self.source.to_example(row)


@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet"])
def test_streams_have_a_shard_for_each_file_and_go_on_where_they_were(tmp_path, kind):
    for shard in range(4):
        texts = [f"{shard}.{index}" for index in range(6)]
        path = tmp_path / f"shards/{shard}.{kind}"
        if kind == "tar":
            write_tar(path, {f"{text}".replace(".", "-") + ".txt": text.encode() for text in texts})
        else:
            rows = [{"text": text} for text in texts]
            write(path, rows if kind == "jsonl" else pa.Table.from_pylist(rows))
    column = {"text_column": "txt"} if kind == "tar" else {}
    source = only({"path": f"{tmp_path}/shards/*.{kind}", "format": "text", **column}, streaming=True)
    assert source.dataset.num_shards == 4
    everything = {f"{shard}.{index}" for shard in range(4) for index in range(6)}
    halves = [{row["content"] for row in Texts(source, rank=rank, world_size=2, repeat=False)} for rank in (0, 1)]
    assert halves[0] | halves[1] == everything and not halves[0] & halves[1]

    samples = list(Texts(source, shuffle_buffer_size=5, repeat=False))
    position = samples[8]["stream_position"]
    resumed = Texts(source, shuffle_buffer_size=5, repeat=False)
    resumed.load_state_dict({"positions": {"0": position}, "next_worker": 0})
    assert [row["content"] for row in resumed] == [row["content"] for row in samples[9:]]
