"""Malformed chats, rows, mixtures and recipes, drawn at random: each is used rightly or refused in one sentence."""

import copy
import dataclasses
import json
import math
import os
import random

import datasets
import numpy as np
import pytest
from training_helpers import TINY_IMAGE_POSITIONS as N
from training_helpers import build_tiny_processor, noise

from transformers_dualtoken.data.samples import BadSampleError
from transformers_dualtoken.data.sources import RowToExample
from transformers_dualtoken.recipe_files import parse_settings
from transformers_dualtoken.training import ChatEncoder, load_chat_sources


# More of them, or others: by the environment.
TIMES = int(os.environ.get("FUZZED_CASES", 400))
SEED = os.environ.get("FUZZED_SEED", "0")
ODD = (
    *(
        None,
        "",
        " ",
        "a",
        "<|im_end|>",
        "<image>",
        "half \ud83d",
        "\0",
        0,
        1,
        -1,
        0.5,
        math.nan,
        math.inf,
        True,
        False,
    ),
    *([], {}, [None], [[]], {"a": None}, [{}], ["a", 1], {"bytes": None, "path": None}, b"", b"\xff", 10**30, ("a",)),
)
KEYS = (
    "role",
    "content",
    "type",
    "text",
    "image",
    "url",
    "weight",
    "train",
    "tool_calls",
    "reasoning_content",
    "name",
    3,
)
CODES = {"pixel_codes": np.ones((3, 3, 3), int).tolist(), "semantic_codes": np.ones((3, 3, 3), int).tolist()}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "One."}]
ROWS = {
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A blue one."},
            {"role": "user", "content": "Draw it."},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Here: "}, {"type": "image", **CODES}],
                "weight": 1,
            },
        ],
        "images": [{"bytes": None, "path": "a.png"}],
    },
    "llava": {"conversations": TURNS, "image": "a.png"},
    "caption": {"image": "a.png", "caption": "A blue one."},
    "edit": {"input_image": "a.png", "instruction": "Invert it.", "edited_image": "a.png"},
    "text": {"text": "A blue one."},
    "interleaved": {"images": ["a.png", None], "texts": [None, "A blue one."]},
}
OPTIONS = {
    "caption": {"task": "draw", "draw_prompt": "{caption}", "describe_prompt": "What?", "image_column": "image"}
    | {"caption_column": "caption"},
    "edit": {"input_column": "input_image", "instruction_column": "instruction", "edited_column": "edited_image"},
    "text": {"text_column": "text", "sample_by": "document"},
}


def places(value, path=()):
    """The way to everything within lists and dicts."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and len(value) < 9:
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def spoiled(value, draw: random.Random):
    """A copy in which one to three things are replaced, left out, repeated or added."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([path for path in places(value) if path] or [()])
        if not path:
            return draw.choice(ODD)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        odd, how = copy.deepcopy(draw.choice(ODD)), draw.randrange(4)
        if how == 0:
            holder[path[-1]] = odd
        elif how == 1:
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.insert(path[-1], odd if how == 2 else copy.deepcopy(holder[path[-1]]))
        else:
            holder[draw.choice(KEYS)] = odd
    return value


def is_sentence(error: Exception) -> bool:
    """One of ours: it says something, and is not passed on from Python's inner workings."""
    text = str(error)
    inner = ("object has no attribute", "unhashable", "not subscriptable", "unsupported operand", "not iterable")
    return len(text.split()) >= 4 and not any(part in text for part in inner)


def check_learned(record: dict, encoded, processor) -> None:
    """What a row became: whole images, and targets that say just what its assistant says."""
    ids, targets = encoded.input_ids, encoded.is_target
    images = ids == processor.image_token_id
    assert images.sum() == N * len(encoded.images)
    for start in np.flatnonzero(ids == processor.image_start_token_id):
        if ids[start + 1] == processor.image_token_id:
            assert len(set(targets[max(1, start) : start + N + 2].tolist())) == 1  # nothing predicts the first token
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        return
    said = processor.decode(ids[targets])
    for message in messages:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
        learned = (
            message["role"] == "assistant" and message.get("weight") != 0 and message.get("train") not in (0, False)
        )
        for text in parts:
            if text and text not in ("a", " ", "What?"):  # which others may say too
                assert (text in said) == learned, (message, said)
        allowed = {"role", "content", "weight", "train", "name"}
        assert all(key in allowed or value in (None, "", [], {}, ()) for key, value in message.items()), message


@pytest.mark.parametrize("name", ROWS)
def test_spoiled_rows_are_learned_rightly_or_named(tmp_path, name):
    draw, processor = random.Random(f"{name} {SEED}"), build_tiny_processor()
    noise(0).save(tmp_path / "a.png")
    to_example = RowToExample(name, "columns", str(tmp_path), OPTIONS.get(name, {}))
    encoder, learned, refused = ChatEncoder(processor, prompt_drop_probability=0), 0, 0
    for _ in range(TIMES):
        record = spoiled(ROWS[name], draw)
        if not isinstance(record, dict):
            continue
        try:
            encoded = encoder.encode(to_example(record))
            encoder.sample(encoded, "")
        except BadSampleError as error:
            assert is_sentence(error), (record, error)
            refused += 1
        else:
            check_learned(record, encoded, processor)
            learned += 1
    assert learned > 0 and refused > TIMES / 10


def test_spoiled_chats_at_inference_are_rendered_or_named():
    draw, processor = random.Random(f"chats {SEED}"), build_tiny_processor()
    chat = copy.deepcopy(ROWS["messages"]["messages"])
    chat[0]["content"][0]["image"] = noise(0)
    chat[3]["content"].pop()
    kept = refused = 0
    for _ in range(TIMES):
        messages = spoiled(chat, draw)
        try:
            processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            kept += 1
        except (ValueError, TypeError, OSError) as error:
            assert is_sentence(error), (messages, error)
            refused += 1
    assert kept and refused


def test_spoiled_mixtures_are_read_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", _no_network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    mixture = {"sources": [{"path": "a.jsonl", "weight": 1.0, "format": "text", "text_column": "text"}] * 2}
    draw = random.Random(f"mixtures {SEED}")
    for number in range(TIMES // 3):
        spec = spoiled(mixture, draw)
        if number % 2:
            (tmp_path / "m.json").write_text(json.dumps(spec, default=str, skipkeys=True))
            spec = "m.json"
        try:
            sources = load_chat_sources(spec, streaming=True)
        except ValueError as error:
            assert is_sentence(error), (spec, error)
        else:
            assert sources and all(source.weight is None or 0 < source.weight < math.inf for source in sources)


def _no_network(path, *args, **kwargs):
    raise FileNotFoundError(f"no {path} here")


@dataclasses.dataclass
class Settings:
    train_dataset: str
    rate: float = 1.0
    steps: int | None = None
    overrides: dict | str | None = None
    parts: list[str] = dataclasses.field(default_factory=list)
    streaming: bool = False


def test_spoiled_recipes_are_read_or_named(tmp_path):
    draw, path = random.Random(f"recipes {SEED}"), tmp_path / "recipe.json"
    recipe = {"train_dataset": "a", "rate": 0.1, "steps": 3, "overrides": {"a": 1}, "parts": ["b"], "streaming": True}
    for _ in range(TIMES):
        path.write_text(json.dumps(spoiled(recipe, draw), default=str, skipkeys=True))
        try:
            (settings,) = parse_settings((Settings,), [str(path)])
        except ValueError as error:
            assert is_sentence(error), (path.read_text(), error)
        else:
            assert type(settings.train_dataset) is str and type(settings.streaming) is bool
            assert type(settings.rate) is float and math.isfinite(settings.rate)
            assert settings.steps is None or type(settings.steps) is int
            assert all(type(part) is str for part in settings.parts)
