"""Sources and mixtures for unified training: which files, which rows, which columns, and what must be refused."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from data_helpers import chat, examples, first_epoch, image, images_of, only, png, write, write_tar

from transformers_dualtoken.data import files
from transformers_dualtoken.data.samples import BadSampleError, ChatSource
from transformers_dualtoken.data.sources import load_chat_sources
from transformers_dualtoken.data.streams import SampleStream


pytestmark = pytest.mark.usefixtures("own_cache")


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

    def load_dataset(name, config, split, streaming):
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
        ({"path": path, "format": "texts"}, "must be one of messages, llava, interleaved, edit, caption, text, codes"),
        ({"path": path, "format": "caption", "task": "paint"}, "`task` .* must be one of draw, describe, both"),
        ({"path": path, "format": "caption", "draw_prompt": "Draw."}, "'{caption}'"),
        (
            {"path": path, "format": "caption"},
            r"lacks a column; it has \['text'\], and needs image_column: image or jpg",
        ),
        ({"path": path, "format": "messages"}, "lacks a column; .* needs one of messages, prompt"),
        ({"path": path, "text_column": "body"}, "text_column: body"),
        ({"path": path, "sample_by": "word"}, "`sample_by` .* must be one of document, line"),
        ({"path": path, "name": "small"}, "`name` is for data sets on the Hub"),
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
    with pytest.raises(ValueError, match="text without images"):
        load_chat_sources(tmp_path / "pairs")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt", "tar"])
def test_names_may_look_like_patterns(tmp_path, ending):
    path = tmp_path / "data [1]" / f"part*0.{ending}"
    if ending == "tar":
        write_tar(path, {"0.json": b'{"text": "x"}'})
    else:
        write(path, {"jsonl": [{"text": "x"}], "parquet": pa.table({"text": ["x"]}), "txt": "x"}[ending])
    for source in (path.parent, path):
        assert [example["content"] for example in examples(source)] == ["x"]


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
    halves = [{row["content"] for row in first_epoch(Texts(source, rank=rank, world_size=2), 24)} for rank in (0, 1)]
    assert halves[0] | halves[1] == everything and not halves[0] & halves[1]

    samples = first_epoch(Texts(source, shuffle_buffer_size=5), 30)
    assert len(samples) == 24
    position = samples[8]["stream_position"]
    resumed = Texts(source, shuffle_buffer_size=5)
    resumed.load_state_dict({"positions": {"0": position}, "next_worker": 0})
    assert [row["content"] for row in first_epoch(resumed, 20)] == [row["content"] for row in samples[9:]]
