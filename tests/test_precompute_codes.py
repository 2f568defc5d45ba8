"""Precomputed codes: what is written, runs that are stopped and go on, several processes, and what is refused."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import tiny_quantizer_fields, tiny_unified_config
from tiny_tokenizer import build_tiny_qwen2_tokenizer
from training_helpers import noise
from transformers import AutoTokenizer

from transformers_dualtoken import (
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenProcessor,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerProcessor,
)
from transformers_dualtoken.data import (
    BadSampleError,
    ChatSource,
    load_code_source,
    precompute_codes,
    tokenizer_fingerprint,
)
from transformers_dualtoken.data import codes as codes_module
from transformers_dualtoken.data.codes import is_code_folder


EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ("pixel", "semantic")
NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png")


@pytest.fixture
def image_processor():
    return DualTokenImageProcessorPil(size={"height": 24, "width": 24})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(NAMES):
        noise(index, size=(30, 26)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:100])
    return folder


def to_example(row: dict) -> dict:
    """What `chat_sources` makes of rows, in short."""
    if row["text"] == "faulty":
        raise BadSampleError("it is faulty")
    parts = [{"type": "image", "image": path} for path in row["images"]]
    parts.append({"type": "text", "text": row["text"]})
    if row["role"] is None:
        return {"content": parts}
    answer = {"role": "assistant", "content": row["text"]}
    return {"id": row["text"], "messages": [{"role": row["role"], "content": parts}, answer]}


def make_source(images: Path, rows: list[tuple], name: str = "chats") -> ChatSource:
    """Rows of (text, names of images), or of (text, names of images, role)."""
    columns = [
        {"text": text, "images": [str(images / file) for file in files], "role": role[0] if role else "user"}
        for text, files, *role in rows
    ]
    features = {"text": datasets.Value("string"), "images": datasets.List(datasets.Value("string"))}
    dataset = datasets.Dataset.from_list(columns, datasets.Features(features | {"role": datasets.Value("string")}))
    return ChatSource(name, dataset, to_example)


ROWS = [
    ("one", ["a.png"]),
    ("two", ["b.png", "c.png"]),
    ("none", []),
    ("again", ["a.png", "d.png", "a.png"]),
    ("document", ["e.png", "b.png"], None),
    ("words only", [], None),
    ("last", ["c.png"]),
]
MORE = [("more", ["d.png"]), ("and more", ["a.png"])]


@pytest.fixture
def sources(images) -> list[ChatSource]:
    return [make_source(images, ROWS), make_source(images, MORE, "others")]


def read_rows(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load_examples(folder: Path, **kwargs) -> list[dict]:
    source = load_code_source(folder, **kwargs)
    return [source.to_example(row) for row in source.dataset]


def image_parts(example: dict) -> list[dict]:
    contents = [message["content"] for message in example.get("messages", [example])]
    return [part for content in contents if not isinstance(content, str) for part in content if "text" not in part]


@pytest.mark.parametrize("streaming", [False, True])
def test_codes_and_examples_come_back(tokenizer, image_processor, sources, tmp_path, streaming):
    model = DualTokenForCausalLM(tiny_unified_config())
    model.vision_tokenizer.load_state_dict(tokenizer.state_dict())
    precompute_codes(tokenizer, image_processor, sources, tmp_path / "codes", batch_size=3, samples_per_shard=4)
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == [
        "dualtoken_codes.json",
        *(f"shard-0000{index}.parquet" for index in range(3)),
    ]
    (tmp_path / "codes").rename(tmp_path / "codes [1]")  # no pattern
    source = load_code_source(tmp_path / "codes [1]", weight=2.0, streaming=streaming)
    assert (source.name, source.weight) == ("codes [1]", 2.0)
    assert isinstance(source.dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(source.dataset)
    assert [row["source"] for row in rows] == ["chats"] * 7 + ["others"] * 2
    assert [row["id"] for row in rows][3:6] == ["again", None, None]
    assert [row["num_images"] for row in rows] == [1, 2, 0, 3, 2, 0, 1, 1, 1]
    to_example = pickle.loads(pickle.dumps(source.to_example))
    wanted = [before.to_example(row) for before in sources for row in before.dataset]
    for row, expected in zip(rows, wanted, strict=True):
        example = to_example(row)
        pairs = list(zip(image_parts(example), image_parts(expected), strict=True))
        for part, original in pairs:
            pixels = image_processor(images=original.pop("image"), return_tensors="pt").pixel_values
            for kind, codes in zip(("pixel", "semantic"), model.model.get_image_codes(pixels)):
                found = part.pop(f"{kind}_codes")
                assert found.dtype == np.int16 and found.shape == (3, 3, 3)
                assert np.array_equal(found, codes[0].numpy())
        assert example == expected  # but for the images


def test_description(tokenizer, image_processor, sources, tmp_path):
    description = precompute_codes(tokenizer, image_processor, sources, tmp_path, samples_per_shard=4)
    assert description.items() >= json.loads((tmp_path / "dualtoken_codes.json").read_text()).items()
    assert description["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer, image_processor)
    assert description["grid"] == [3, 3] and description["num_shards"] == 3
    assert description["num_depths"] == {"pixel": 3, "semantic": 3}
    assert description["codebook_size"] == {"pixel": 24, "semantic": 24}
    assert [(source["name"], source["num_rows"]) for source in description["sources"]] == [("chats", 7), ("others", 2)]
    assert (description["num_samples"], description["num_images"], description["num_skipped"]) == (9, 11, 0)


def record_batches(tokenizer, monkeypatch) -> list[int]:
    """Sizes of the batches that the tokenizer encodes from now on."""
    sizes, encode = [], tokenizer.encode

    def counting(pixel_values, **kwargs):
        assert kwargs == {"features": False} and not torch.is_grad_enabled() and not tokenizer.training
        sizes.append(len(pixel_values))
        return encode(pixel_values, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", counting)
    return sizes


def test_images_are_encoded_in_batches_of_a_shard(tokenizer, image_processor, sources, tmp_path, monkeypatch):
    sizes = record_batches(tokenizer, monkeypatch)
    tokenizer.train()
    embeddings = tokenizer.pixel_quantizer.codebook.embeddings.clone()
    settings = {"batch_size": 3, "samples_per_shard": 5}
    description = precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings)
    assert sizes == [3, 3, 2, 3]
    assert tokenizer.training and torch.equal(tokenizer.pixel_quantizer.codebook.embeddings, embeddings)
    # The folder is whole: nothing is left to do.
    assert precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings) == description
    assert len(sizes) == 4


def test_streams_and_samples_that_have_codes_are_refused(tokenizer, image_processor, sources, tmp_path):
    precompute_codes(tokenizer, image_processor, sources, tmp_path / "first")
    with pytest.raises(ValueError, match=r"The sources \['first'\] hold codes already"):
        precompute_codes(
            tokenizer,
            image_processor,
            [*sources, load_code_source(tmp_path / "first")],
            tmp_path / "second",
            on_bad_sample="skip",
        )
    sources[1].dataset = sources[1].dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="of data sets and not of streams: load the sources without `streaming`"):
        precompute_codes(tokenizer, image_processor, sources, tmp_path / "third")


@pytest.mark.parametrize(("codebook_size", "dtype"), [(2**15, "int16"), (2**15 + 1, "int32")])
def test_integers_are_as_narrow_as_the_codebook_allows(
    make_tokenizer, image_processor, images, tmp_path, codebook_size, dtype
):
    fields = tiny_quantizer_fields(codebook_size=codebook_size)
    tokenizer = make_tokenizer(pixel_quantizer_config=fields)
    with torch.no_grad():  # only the last codes are near
        tokenizer.pixel_quantizer.codebook.embeddings[:, :-8] += 1000
    precompute_codes(tokenizer, image_processor, [make_source(images, ROWS)], tmp_path)
    (shard,) = tmp_path.glob("*.parquet")
    schema = pq.read_schema(shard)
    assert str(schema.field("pixel_codes").type.value_type.value_type) == dtype
    assert str(schema.field("semantic_codes").type.value_type.value_type) == "int16"
    codes = image_parts(load_examples(tmp_path)[0])[0]["pixel_codes"]
    assert codes.dtype == dtype and codes.min() >= codebook_size - 8


def test_stopped_run_goes_on(tokenizer, image_processor, sources, tmp_path, monkeypatch):
    settings = {"batch_size": 2, "samples_per_shard": 2}
    precompute_codes(tokenizer, image_processor, sources, tmp_path / "whole", **settings)
    stopped, write = tmp_path / "stopped", pq.ParquetWriter.write_table
    num_written = []

    def failing(writer, *args):
        if len(num_written) == 2:
            raise KeyboardInterrupt
        num_written.append(1)
        write(writer, *args)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute_codes(tokenizer, image_processor, sources, stopped, **settings)
    monkeypatch.undo()
    assert len(list(stopped.glob("*.parquet"))) == 2 and len(list(stopped.glob("*.tmp"))) == 1
    assert is_code_folder(stopped)
    with pytest.raises(ValueError, match=r"are not finished: of 5 shards are missing \['shard-00002"):
        load_code_source(stopped)
    times = {path: path.stat().st_mtime_ns for path in stopped.glob("*.parquet")}
    sizes = record_batches(tokenizer, monkeypatch)
    precompute_codes(tokenizer, image_processor, sources, stopped, **settings)
    assert sum(sizes) == 5  # of eleven; six were there
    assert read_bytes(stopped) == read_bytes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in times.items())


def test_several_processes_write_the_same(tokenizer, image_processor, sources, tmp_path):
    settings = {"batch_size": 2, "samples_per_shard": 2}
    one, three = tmp_path / "one", tmp_path / "three"
    precompute_codes(tokenizer, image_processor, sources, one, **settings)
    assert [json.loads(row["example"]).get("id") for row in read_rows(one)] == [
        *("one", "two", "none", "again", None, None, "last", "more", "and more")
    ]
    three.mkdir()
    other = three / "dualtoken_codes.json.0000.tmp"  # which another process is about to rename
    other.touch()
    descriptions = [
        precompute_codes(tokenizer, image_processor, sources, three, rank=rank, world_size=3, **settings)
        for rank in (2, 0, 1)
    ]
    assert [description is None for description in descriptions] == [True, True, False]
    other.unlink()
    assert read_bytes(one) == read_bytes(three)


def test_worker_processes_change_nothing(tokenizer, image_processor, sources, tmp_path):
    precompute_codes(tokenizer, image_processor, sources, tmp_path / "none", samples_per_shard=4)
    precompute_codes(tokenizer, image_processor, sources, tmp_path / "two", samples_per_shard=4, num_workers=2)
    assert read_bytes(tmp_path / "none") == read_bytes(tmp_path / "two")


BAD = [
    *(("one", ["a.png"]), ("torn", ["b.png", "broken.png"]), ("faulty", []), ("gone", ["missing.png"])),
    ("two", ["c.png"]),
]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_named(tokenizer, image_processor, images, tmp_path, num_workers):
    for rows, message in (
        (
            BAD[:2],
            r"The sample 1 of chats \(id torn\) cannot be trained on: its image .*broken.png cannot be used: it is tru",
        ),
        (BAD[2:3], r"The sample 0 of chats cannot be trained on: it is faulty\. Mend it"),
        (
            BAD[3:],
            r"The sample 0 of chats \(id gone\) cannot be trained on: its image .*missing.png cannot be used: the file ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            source = make_source(images, rows)
            precompute_codes(tokenizer, image_processor, [source], tmp_path / rows[0][0], num_workers=num_workers)


def test_bad_samples_are_skipped_and_counted(tokenizer, image_processor, images, tmp_path, caplog):
    settings = {"samples_per_shard": 1}
    with pytest.raises(ValueError, match="torn"):
        precompute_codes(tokenizer, image_processor, [make_source(images, BAD)], tmp_path, **settings)
    # The whole shards of the run that was refused are kept.
    (first,) = tmp_path.glob("*.parquet")
    time_of_first = first.stat().st_mtime_ns
    description = precompute_codes(
        tokenizer, image_processor, [make_source(images, BAD)], tmp_path, **settings, on_bad_sample="skip"
    )
    assert first.stat().st_mtime_ns == time_of_first
    assert (description["num_samples"], description["num_images"], description["num_skipped"]) == (2, 2, 3)
    names = ("1 of chats (id torn)", "2 of chats", "3 of chats (id gone)")
    for message, name in zip(caplog.messages, names, strict=True):
        assert f"The sample {name} cannot be trained on" in message
    # Shards without a sample are read like others.
    for streaming in (False, True):
        assert [example["id"] for example in load_examples(tmp_path, streaming=streaming)] == ["one", "two"]


def test_nothing_but_bad_samples_is_refused(tokenizer, image_processor, images, tmp_path, monkeypatch):
    monkeypatch.setattr(codes_module, "MAX_SKIPPED_IN_A_ROW", 3)
    source = make_source(images, [("faulty", [])] * 4)
    with pytest.raises(
        ValueError, match="3 samples in a row cannot be used. The last: The sample 2 of chats .* it is faulty"
    ):
        precompute_codes(tokenizer, image_processor, [source], tmp_path, on_bad_sample="skip")
    source.dataset = source.dataset.select([])
    with pytest.raises(ValueError, match=r"\['chats'\] hold no rows"):
        precompute_codes(tokenizer, image_processor, [source], tmp_path)


def test_other_faults_name_the_sample(tokenizer, image_processor, images, tmp_path):
    source = make_source(images, ROWS)
    source.to_example = {}.__getitem__
    with pytest.raises(RuntimeError, match=r"The sample 0 of chats cannot be read \(TypeError\(.unhashable"):
        precompute_codes(tokenizer, image_processor, [source], tmp_path, on_bad_sample="skip")


def test_folder_of_other_arguments_is_refused(make_tokenizer, image_processor, images, tmp_path):
    def run(tokenizer=None, image_processor=image_processor, rows=ROWS, **settings):
        source = make_source(images, rows)
        return precompute_codes(tokenizer or make_tokenizer(), image_processor, [source], tmp_path, **settings)

    run()
    other = make_tokenizer()
    other.pixel_quantizer.codebook.embeddings[0, 0, 0] += 1
    for changed, key in (
        ({"tokenizer": other}, "tokenizer_fingerprint"),
        ({"image_processor": DualTokenImageProcessorPil(size=24, resize_mode="pad")}, "tokenizer_fingerprint"),
        ({"rows": ROWS[:-1]}, "sources"),
        ({"rows": [*ROWS[:-1], ("changed", ["a.png"])]}, "sources"),
        ({"samples_per_shard": 3}, "samples_per_shard"),
        ({"bf16": True}, "autocast"),
    ):
        with pytest.raises(ValueError, match=f"was begun with other settings: {key} was .* and is now "):
            run(**changed)
    before = read_bytes(tmp_path)
    run(batch_size=1, on_bad_sample="skip")
    assert read_bytes(tmp_path) == before


def test_folders_that_cannot_be_loaded(tokenizer, image_processor, sources, tmp_path):
    settings = {"samples_per_shard": 4}
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no folder of precomputed codes: it has no dualtoken_codes.json"):
            load_code_source(folder)
        assert not is_code_folder(folder)
    precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings)
    whole, shard = read_bytes(tmp_path), tmp_path / "shard-00001.parquet"
    shard.unlink()
    with pytest.raises(ValueError, match="are not finished: .*shard-00001.parquet.*Start precompute_codes"):
        load_code_source(tmp_path)
    precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings)
    assert read_bytes(tmp_path) == whole
    # A shard that was damaged while another one was missing.
    (tmp_path / "shard-00000.parquet").unlink()
    shard.write_bytes(whole[shard.name][:-50])
    with pytest.raises(ValueError, match="cannot be read, it is truncated or damaged .*shard-00001.parquet"):
        precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings)
    description = tmp_path / "dualtoken_codes.json"
    for text in ("{", "[]", "3", "{}"):
        description.write_text(text)
        for call in (load_code_source, lambda path: precompute_codes(tokenizer, image_processor, sources, path)):
            with pytest.raises(ValueError, match="dualtoken_codes.json in .* is damaged"):
                call(tmp_path)
    description.write_text(json.dumps({**json.loads(whole[description.name]), "format_version": 1}))
    with pytest.raises(ValueError, match="are of format 1; this version of transformers-dualtoken reads format 2"):
        load_code_source(tmp_path)
    description.unlink()
    with pytest.raises(ValueError, match="is no folder of precomputed codes: it has no dualtoken_codes.json"):
        precompute_codes(tokenizer, image_processor, sources, tmp_path, **settings)


@pytest.mark.parametrize(
    ("column", "spoil", "match"),
    [
        (
            "pixel_codes",
            lambda codes: [image[:-1] for image in codes],
            "row of codes is damaged .*into shape",
        ),
        ("pixel_codes", lambda codes: codes[:-1], "row of codes is damaged"),
        (
            "semantic_codes",
            lambda codes: [[99, *image[1:]] for image in codes],
            "semantic codes must be from 0 to 23, got .* to 99",
        ),
        (
            "semantic_codes",
            lambda codes: [[-1, *image[1:]] for image in codes],
            "semantic codes must be from 0 to 23, got -1 to",
        ),
        ("semantic_codes", lambda codes: None, "row of codes is damaged"),
        ("example", lambda example: "{", "row of codes is damaged"),
    ],
)
def test_damaged_rows_of_codes_are_bad_samples(tokenizer, image_processor, sources, tmp_path, column, spoil, match):
    precompute_codes(tokenizer, image_processor, sources[:1], tmp_path)
    source = load_code_source(tmp_path)
    row = source.dataset[1]
    assert source.to_example(row)
    with pytest.raises(BadSampleError, match=match):
        source.to_example({**row, column: spoil(row[column])})


def test_codes_of_another_tokenizer_are_refused(make_tokenizer, image_processor, sources, tmp_path):
    tokenizer, other = make_tokenizer(), make_tokenizer(shortcut_weight=0.5)
    precompute_codes(tokenizer, image_processor, sources, tmp_path)
    own, foreign = (tokenizer_fingerprint(model, image_processor) for model in (tokenizer, other))
    assert load_code_source(tmp_path, fingerprint=own).dataset.num_rows == 9
    with pytest.raises(ValueError, match=f"made by {own}, and the model's tokenizer is {foreign}. Make them again"):
        load_code_source(tmp_path, fingerprint=foreign)

    # Training may hold the same tokenizer in bfloat16.
    for model, fits in ((tokenizer, True), (other, False)):
        rounded = tokenizer_fingerprint(model.to(torch.bfloat16), image_processor)
        assert rounded not in (own, foreign)
        if fits:
            assert load_code_source(tmp_path, fingerprint=rounded).dataset.num_rows == 9
        else:
            with pytest.raises(ValueError, match="Make them again"):
                load_code_source(tmp_path, fingerprint=rounded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"samples_per_shard": 0}, "`samples_per_shard` must be at least 1"),
        ({"on_bad_sample": "ignore"}, "`on_bad_sample` must be 'error' or 'skip', got 'ignore'"),
        ({"rank": 2, "world_size": 2}, "`rank` must be an integer from 0 to 1, got 2"),
    ],
)
def test_arguments_out_of_range(tokenizer, image_processor, sources, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        precompute_codes(tokenizer, image_processor, sources, tmp_path, **arguments)


class TestFingerprint:
    def test_is_kept_by_saving_and_within_a_unified_model(self, tokenizer, image_processor, tmp_path):
        fingerprint = tokenizer_fingerprint(tokenizer, image_processor)
        assert len(fingerprint) == 64 and int(fingerprint, 16)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        image_processor.save_pretrained(tmp_path / "tokenizer")
        loaded = DualTokenVisionTokenizer.from_pretrained(tmp_path / "tokenizer")
        loaded_processor = DualTokenImageProcessorPil.from_pretrained(tmp_path / "tokenizer")
        assert tokenizer_fingerprint(loaded, loaded_processor) == fingerprint
        model = DualTokenForCausalLM(tiny_unified_config())
        model.vision_tokenizer.load_state_dict(tokenizer.state_dict())
        model.save_pretrained(tmp_path / "model")
        model = DualTokenForCausalLM.from_pretrained(tmp_path / "model")
        assert tokenizer_fingerprint(model.vision_tokenizer, image_processor) == fingerprint

    def test_what_decides_no_code_is_left_out(self, tokenizer, image_processor):
        fingerprint = tokenizer_fingerprint(tokenizer, image_processor)
        deciding = ("siglip.vision_model.embeddings", "down_proj", "codebook.embeddings")
        deciding += tuple(f"siglip.vision_model.encoder.layers.{index}." for index in range(3))
        num_left_out = 0
        with torch.no_grad():
            for name, tensor in tokenizer.state_dict().items():
                if not any(part in name for part in deciding) or ".mlp.down_proj" in name and "up_proj.mlp" in name:
                    num_left_out += 1
                    tensor.add_(1)
        assert num_left_out > 50
        assert tokenizer_fingerprint(tokenizer.train(), image_processor) == fingerprint
        tokenizer.config.pixel_quantizer_config.ema_decay = 0.5
        image_processor.fill_color = (0, 0, 0)  # `squash` has no padding
        assert tokenizer_fingerprint(tokenizer, image_processor) == fingerprint

    def test_every_tensor_that_decides_a_code_counts(self, tokenizer, image_processor, pixel_values):
        """Independent of the names: whatever the codes' gradient, or the codes themselves, can depend on."""
        encoded = tokenizer.encode(pixel_values, features=False)
        (encoded.pixel_commitment_loss + encoded.semantic_commitment_loss).backward()
        tensors = {name: value for name, value in tokenizer.named_parameters() if value.grad is not None}
        tensors |= {f"{kind} codebook": tokenizer.quantizer(kind).codebook.embeddings for kind in KINDS}
        seen = {tokenizer_fingerprint(tokenizer, image_processor)}
        with torch.no_grad():
            for count, tensor in enumerate(tensors.values(), start=2):
                tensor.view(-1)[-1] += 1
                seen.add(tokenizer_fingerprint(tokenizer, image_processor))
                assert len(seen) == count

    @pytest.mark.parametrize(
        "change", ["shortcut_weight", "no shortcut", "pixel_layer", "heads", "depths", "bfloat16"]
    )
    def test_settings_of_the_tokenizer_count(self, make_tokenizer, image_processor, change):
        fingerprint = tokenizer_fingerprint(make_tokenizer(), image_processor)
        encoder = make_tokenizer().config.vision_config.to_dict()
        other = {
            "shortcut_weight": lambda: make_tokenizer(shortcut_weight=0.5),
            "no shortcut": lambda: make_tokenizer(shortcut_layer=None),
            "pixel_layer": lambda: make_tokenizer(pixel_layer=1),
            "heads": lambda: make_tokenizer(vision_config={**encoder, "num_attention_heads": 2}),
            "depths": lambda: make_tokenizer(semantic_quantizer_config=tiny_quantizer_fields(num_depths=2)),
            "bfloat16": lambda: make_tokenizer().to(torch.bfloat16),
        }[change]()
        assert tokenizer_fingerprint(other, image_processor) != fingerprint

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": {"height": 24, "width": 32}},
            {"resize_mode": "center_crop"},
            {"resize_mode": "pad"},
            {"resize_mode": "pad", "fill_color": 0},
            {"resample": 2},
            {"image_mean": [0.4, 0.5, 0.5]},
            {"image_std": [0.4, 0.5, 0.5]},
            {"rescale_factor": 1 / 128},
            {"do_resize": False},
            {"do_normalize": False},
        ],
        ids=str,
    )
    def test_settings_of_the_image_processor_count(self, tokenizer, settings):
        own, other = ({"size": {"height": 24, "width": 24}, **changed} for changed in ({}, settings))
        if "fill_color" in settings:
            own["resize_mode"] = "pad"
        one, two = (tokenizer_fingerprint(tokenizer, DualTokenImageProcessorPil(**kwargs)) for kwargs in (own, other))
        assert one != two


@pytest.fixture
def checkpoint(tokenizer, image_processor, siglip_folder, tmp_path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = AutoTokenizer.from_pretrained(siglip_folder)
    DualTokenVisionTokenizerProcessor(image_processor, texts, text_length=8).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_chats(folder: Path, count: int) -> Path:
    """JSON lines with a different image each, large enough that reading them takes some time."""
    (folder / "images").mkdir()
    with (folder / "chats.jsonl").open("w") as file:
        for index in range(count):
            noise(index, size=(160, 160)).save(folder / "images" / f"{index}.png")
            parts = [{"type": "image", "image": f"images/{index}.png"}, {"type": "text", "text": "what"}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"noise {index}"}]
            file.write(json.dumps({"id": f"{index}", "messages": messages}) + "\n")
    return folder / "chats.jsonl"


SMALL = ["--use_cpu", "1", "--num_workers", "0", "--batch_size", "4", "--samples_per_shard", "8"]


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import precompute_codes as script

    return script.main


def test_example(main, checkpoint, tmp_path, capsys):
    chats = write_chats(tmp_path, 20)
    (tmp_path / "images" / "3.png").write_bytes(b"")
    arguments = ["--model_name_or_path", str(checkpoint), "--dataset", str(chats), *SMALL]
    with pytest.raises(ValueError, match=r"The sample 3 of .* \(id 3\) cannot be trained on: .*the file is empty"):
        main([*arguments, "--output_dir", str(tmp_path / "codes")])
    main([*arguments, "--output_dir", str(tmp_path / "codes"), "--on_bad_sample", "skip"])
    shown = capsys.readouterr().out
    assert "codes is finished: 19 samples with 19 images in 3 shards; 1 samples skipped." in shown
    # The same by a file of settings.
    settings = dict(zip([name[2:] for name in SMALL[::2]], map(int, SMALL[1::2])))
    settings |= {"model_name_or_path": str(checkpoint), "dataset": str(chats), "output_dir": str(tmp_path / "other")}
    settings |= {"dataset_format": "messages", "dataset_options": {"image_folder": str(tmp_path)}}
    (tmp_path / "settings.yaml").write_text(json.dumps({**settings, "on_bad_sample": "skip"}))
    main([str(tmp_path / "settings.yaml")])
    np.testing.assert_equal(load_examples(tmp_path / "other"), load_examples(tmp_path / "codes"))


def test_example_takes_the_tokenizer_of_a_unified_model(main, checkpoint, tokenizer, image_processor, tmp_path):
    model = DualTokenForCausalLM(tiny_unified_config())
    model.vision_tokenizer.load_state_dict(tokenizer.state_dict())
    model.save_pretrained(tmp_path / "model")
    texts = build_tiny_qwen2_tokenizer(["words"])
    DualTokenProcessor(image_processor, texts, num_image_tokens=9).save_pretrained(tmp_path / "model")
    chats = write_chats(tmp_path, 2)
    for name in ("tokenizer", "model"):
        output = ["--output_dir", str(tmp_path / f"codes of {name}")]
        main(["--model_name_or_path", str(tmp_path / name), "--dataset", str(chats), *SMALL, *output])
    assert read_bytes(tmp_path / "codes of tokenizer") == read_bytes(tmp_path / "codes of model")


@pytest.mark.slow
def test_killed_run_goes_on_and_two_processes_write_the_same(main, checkpoint, tmp_path):
    chats = write_chats(tmp_path, 300)
    arguments = ["--model_name_or_path", str(checkpoint), "--dataset", str(chats), *SMALL, "--output_dir"]
    main([*arguments, str(tmp_path / "whole")])
    script, killed = str(EXAMPLES / "precompute_codes.py"), tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, script, *arguments, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list(killed.glob("*.parquet"))) < 5:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_shards = len(list(killed.glob("*.parquet")))
    assert 5 <= num_shards < 38
    with pytest.raises(ValueError, match="are not finished: of 38 shards are missing"):
        load_code_source(killed)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, script, *arguments, str(killed)], check=True, capture_output=True)
    assert read_bytes(killed) == read_bytes(tmp_path / "whole")
