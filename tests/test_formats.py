"""Every format of data for unified training, from real files, memory-mapped and streamed."""

import base64
import gzip
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from data_helpers import chat, examples, image, images_of, only, png, refused, text, write, write_tar
from training_helpers import noise

from transformers_dualtoken.data.samples import BadSampleError
from transformers_dualtoken.data.sources import load_chat_sources
from transformers_dualtoken.image_reading import read_image


pytestmark = pytest.mark.usefixtures("own_cache")


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
        ({"messages": [chat("a", "b")["messages"]] * 2}, "list of conversations"),
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
        table = pa.Table.from_pylist([{name: row, "system": "Be short."}])
        (example,) = examples(write(tmp_path / f"{name}.parquet", table))
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
