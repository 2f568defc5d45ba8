"""Conversations and documents as samples: tokens, labels, dropped prompts, mixtures, packing, and what is refused."""

import collections
import copy
import itertools
import json
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from tiny_models import lively_unified_model
from torch.utils.data import DataLoader
from training_helpers import TINY_IMAGE_POSITIONS as N
from training_helpers import build_tiny_processor, say, write_images

from transformers_dualtoken.data.collators import pack
from transformers_dualtoken.data.samples import BadSampleError
from transformers_dualtoken.training import (
    ChatEncoder,
    ChatSource,
    DualTokenChatDataset,
    DualTokenChatStream,
    DualTokenDataCollator,
    StreamProgress,
    collate_images,
)


IMAGE = "<|vision_start|>" + N * "<|image_pad|>" + "<|vision_end|>"
HEAD = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor():
    return build_tiny_processor()


@pytest.fixture
def encoder(processor) -> ChatEncoder:
    return ChatEncoder(processor, prompt_drop_probability=0)


@pytest.fixture(scope="module")
def model(processor):
    return lively_unified_model(
        text_config={**lively_unified_model().config.text_config.to_dict(), "vocab_size": 400},
        image_start_token_id=processor.image_start_token_id,
        image_token_id=processor.image_token_id,
        image_end_token_id=processor.image_end_token_id,
    )


def coded(number: int) -> dict:
    """An image part with codes of its own."""
    generator = torch.Generator().manual_seed(number)
    pixel, semantic = torch.randint(24, (2, 3, 3, 3), generator=generator)
    return {"type": "image", "pixel_codes": pixel.numpy(), "semantic_codes": semantic.numpy()}


def chat(question, answer) -> dict:
    return {"messages": [say("user", *question), say("assistant", *answer)]}


DRAWING = chat([coded(1), "Draw it."], ["Here: ", coded(2), "and", coded(1)])
ANSWER = chat([coded(1), "What is it?"], ["A blue one."])
TEXT = chat(["What?"], ["A blue one, a blue one."])
DOCUMENT = {"content": [{"type": "text", "text": "A blue one: "}, coded(3), {"type": "text", "text": " Draw it."}]}


def dataset_of(examples, processor, seed=0, on_bad_sample="error", **options) -> DualTokenChatDataset:
    encoder = ChatEncoder(processor, **{"prompt_drop_probability": 0, **options})
    return DualTokenChatDataset(examples, encoder, seed=seed, on_bad_sample=on_bad_sample)


# One sample


def test_targets_of_a_chat_are_what_the_assistant_says(processor, encoder):
    example = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            say("user", coded(1), "What is it?", coded(2)),
            {"role": "assistant", "content": "A blue one."},
            say("user", "Draw it."),
            say("assistant", "Here: ", coded(3), " done."),
        ]
    }
    sample = encoder.sample(encoder.encode(example), "")
    rendered = (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{IMAGE}What is it?{IMAGE}<|im_end|>\n{HEAD}"
        f"A blue one.<|im_end|>\n<|im_start|>user\nDraw it.<|im_end|>\n{HEAD}Here: {IMAGE} done.<|im_end|>\n"
    )
    assert processor.decode(sample["input_ids"]) == rendered
    is_target = sample["labels"] != -100
    assert torch.equal(sample["labels"][is_target], sample["input_ids"][is_target])
    assert processor.decode(sample["labels"][is_target]) == f"A blue one.<|im_end|>Here: {IMAGE} done.<|im_end|>"
    for key in ("pixel_codes", "semantic_codes"):
        assert sample[key].dtype == torch.int64
        assert torch.equal(sample[key], torch.stack([torch.as_tensor(coded(number)[key]) for number in (1, 2, 3)]))


def test_all_of_a_document_is_learned(processor, encoder):
    content = [{"type": "text", "text": "A <|im_end|> b"}, coded(1), {"type": "text", "text": ""}, coded(2)]
    sample = encoder.sample(encoder.encode({"content": content}), "")
    eos = processor.tokenizer.eos_token
    assert processor.decode(sample["input_ids"]) == f"A <|im_end|> b{IMAGE}{IMAGE}{eos}"
    # A special token that is typed stays text.
    assert (sample["input_ids"] == processor.tokenizer.eos_token_id).sum() == 1
    assert sample["labels"][0] == -100 and torch.equal(sample["labels"][1:], sample["input_ids"][1:])
    assert len(sample["pixel_codes"]) == 2

    sample = encoder.sample(encoder.encode({"content": "A blue one."}), "")
    assert processor.decode(sample["input_ids"]) == f"A blue one.{eos}"
    assert set(sample) == {"input_ids", "labels"}


def test_images_are_read_where_there_are_no_codes(encoder, tmp_path):
    write_images(tmp_path, 2)
    from PIL import Image

    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    example = chat([(paths[0],), "What is it?"], [(paths[1],)])
    sample = encoder.sample(encoder.encode(example), "")
    images = [Image.open(path) for path in paths]
    expected = encoder.processor.image_processor(images, return_tensors="pt").pixel_values
    assert torch.equal(sample["pixel_values"], expected)


def test_dropped_prompt_begins_with_the_first_drawn_image(processor):
    whole, dropped = (dataset_of([DRAWING, ANSWER, DOCUMENT], processor, prompt_drop_probability=p) for p in (0, 1))
    before, after = whole[0], dropped[0]
    start = int((before["labels"] == processor.image_start_token_id).nonzero()[0])
    assert torch.equal(after["input_ids"], before["input_ids"][start:])
    # Nothing predicts what now comes first.
    assert int(after["labels"][0]) == -100 and int(after["input_ids"][0]) == processor.image_start_token_id
    assert torch.equal(after["labels"][1:], before["labels"][start + 1 :])
    # The image in the question is gone with it.
    for name in ("pixel_codes", "semantic_codes"):
        assert torch.equal(after[name], before[name][1:])
    # Input images alone are no drawing.
    assert all(torch.equal(whole[1][name], dropped[1][name]) for name in ("input_ids", "labels", "pixel_codes"))
    assert int(dropped[2]["input_ids"][0]) == processor.image_start_token_id


def test_dropped_prompt_predicts_as_an_empty_context(processor, model):
    """What is left is generation's unconditional context, and the same as a prompt that is masked."""
    whole, dropped = (dataset_of([DRAWING], processor, prompt_drop_probability=p)[0] for p in (0, 1))
    batch = DualTokenDataCollator(0)([whole])
    start = len(whole["input_ids"]) - len(dropped["input_ids"])
    batch["attention_mask"][:, :start] = 0
    batch["labels"][:, : start + 1] = -100
    with torch.no_grad():
        masked, alone = model(**batch), model(**DualTokenDataCollator(0)([dropped]))
    for name in ("text_loss", "pixel_loss", "semantic_loss"):
        torch.testing.assert_close(masked[name], alone[name], rtol=1e-4, atol=1e-4)


def test_prompt_drop_depends_on_seed_epoch_and_index_only(processor):
    def drops(seed, epoch, order):
        dataset = dataset_of([DRAWING, ANSWER] * 20, processor, seed=seed, prompt_drop_probability=0.5)
        dataset.set_epoch(epoch)
        torch.rand(seed + epoch)  # global random state plays no part
        found = {index: dataset[index]["input_ids"][0] == processor.image_start_token_id for index in order}
        return [bool(found[index]) for index in range(40)]

    first = drops(0, 0, range(40))
    assert first == drops(0, 0, reversed(range(40)))
    assert first != drops(1, 0, range(40)) and first != drops(0, 1, range(40))
    assert 4 <= sum(first) <= 16 and not any(first[1::2])


# What is refused


BAD = [
    ({"messages": [say("user", "a")]}, "no assistant message that is learned"),
    ({"messages": []}, "it has no messages"),
    ({"messages": None}, "it has no messages"),
    ({"messages": [[say("user", "a")], [say("user", "b")]]}, "a list of conversations; a sample must be one"),
    ({"messages": [say("user", "a"), {**say("assistant", "b"), "weight": 0}]}, "no assistant message that is learned"),
    ({"messages": [say("user", "a"), say("assistant", "b"), say("assistant", "")]}, "says nothing in message 2"),
    ({"messages": [say("user", "a"), {"role": "assistant", "content": None}]}, "says nothing in message 1"),
    (
        {"messages": [say("user", "a"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "'assistant' has 'tool_calls', which the chat template does not write",
    ),
    (
        {"messages": [say("user", "a"), {**say("assistant", "b"), "reasoning_content": "c"}]},
        "has 'reasoning_content', which",
    ),
    ({"messages": [say("user", "a"), {**say("assistant", "b"), "answer": "c"}]}, "has 'answer', which"),
    ({"messages": [say("tool", "a"), say("assistant", "b")]}, "has the role 'tool'; the roles are system, user"),
    ({"messages": [say("user", "a"), {**say("assistant", "b"), "weight": 0.5}]}, "'weight' .* must be 0 .*got 0.5"),
    ({"messages": [say("user", "a"), {**say("assistant", "b"), "train": "no"}]}, "'train' .* must be 0 .*got 'no'"),
    ({"messages": [{**say("user", "a"), "weight": 1}, say("assistant", "b")]}, "'user' has 'weight' = 1, but only an"),
    ({**chat(["a"], ["b"]), "tools": [{"name": "c"}]}, "does not write `tools`"),
    ({"messages": [say("user", "a"), {"role": "assistant", "content": "b"}], "content": "c"}, "either 'messages'"),
    ({"content": ""}, "it has no content"),
    ({"content": "half \ud83d"}, "half a character at position 5"),
    (chat(["a"], ["half \ud83d"]), "half a character at position"),
    ({"messages": [say("user", {"type": "image"}), say("assistant", "b")]}, "image 0 has no image data"),
    ({"messages": [say("user", {"type": "video"}), say("assistant", "b")]}, "part of type 'video'"),
    (chat(["a " * 40], ["b"]), "more than `max_length` = 60"),
]


@pytest.mark.parametrize(
    "unlearned", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}]
)
def test_answers_that_are_not_to_be_learned_are_context(encoder, processor, unlearned):
    """Their images too; what is said in them is the same."""
    first, second = say("assistant", "A blue one ", coded(1)), say("assistant", "Here: ", coded(2))
    named = {"name": "painter", "id": 3, "tool_calls": [], "reasoning_content": "", "refusal": None}
    messages = [
        say("user", "Draw it."),
        {**first, **unlearned},
        say("user", "Another."),
        {**second, **named, "weight": 1},
    ]
    encoded = encoder.encode({"messages": messages})
    plain = encoder.encode({"messages": [say("user", "Draw it."), first, say("user", "Another."), second]})
    assert np.array_equal(encoded.input_ids, plain.input_ids)
    said = processor.decode(encoded.input_ids[encoded.is_target])
    assert said == f"Here: {IMAGE}<|im_end|>"
    sample = encoder.sample(encoded, "")
    assert (sample["labels"] == processor.image_token_id).sum() == N and sample["pixel_codes"].shape[0] == 2


def test_a_template_that_writes_tools_and_reasoning_gets_them(processor):
    template = """{% for m in messages %}{{ m['role'] + ':' + (m['reasoning_content'] | default('')) }}{% if m['role'] ==
        'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}{% endfor %}{{ tools }}"""
    processor = copy.copy(processor)
    processor.chat_template = template
    messages = [{"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    encoded = ChatEncoder(processor).encode({"messages": messages, "tools": [{"name": "c"}]})
    assert processor.decode(encoded.input_ids) == "assistant:hmb[{'name': 'c'}]"
    # Tool calls without content say something.
    processor.chat_template = (
        "{% generation %}{{ messages[0]['content'] ~ messages[0]['tool_calls'] }}{% endgeneration %}"
    )
    messages = [{"role": "assistant", "content": None, "tool_calls": [1]}]
    encoded = ChatEncoder(processor).encode({"messages": messages})
    assert processor.decode(encoded.input_ids[encoded.is_target]) == "1]"  # nothing predicts the first token
    # Without a range for each answer it is not known which is meant.
    processor.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    messages = [{**say("assistant", "a"), "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadSampleError, match="marks 1 ranges for 2 messages"):
        ChatEncoder(processor).encode({"messages": messages})


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_samples_are_named_or_skipped_and_counted(processor, bad, reason, caplog):
    examples = [TEXT, {**bad, "id": "x7"}, ANSWER]
    with pytest.raises(ValueError, match=r"The sample 1 of the examples \(id x7\) cannot be trained on: .*" + reason):
        dataset_of(examples, processor, max_length=60)
    dataset = dataset_of(examples, processor, max_length=60, on_bad_sample="skip")
    assert len(dataset) == 2 and dataset.num_skipped == 1
    assert torch.equal(dataset[1]["input_ids"], dataset_of([ANSWER], processor)[0]["input_ids"])
    with pytest.raises(ValueError, match="the examples has no sample that can be trained on; 1 were skipped.*"):
        dataset_of([bad], processor, max_length=60, on_bad_sample="skip")


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ([], "no sources"),
        ([TEXT, ChatSource("a", [TEXT], dict)], "must be ChatSources.* got ChatSource, dict"),
        (["a.jsonl"], "must be ChatSources.* got str"),
        (
            [ChatSource("a", [TEXT], dict, float("nan"))],
            "The weight of 'a .1.' must be a finite number above 0, got nan",
        ),
        ([ChatSource("a", [TEXT], dict, "1")], "The weight of 'a .1.' must be a finite number above 0, got '1'"),
        ([ChatSource("a", [], dict)], "The source a has no sample"),
        ([ChatSource("a", datasets.Dataset.from_dict({"content": []}), dict)], "The source a has no sample"),
    ],
)
def test_odd_sources_are_named(encoder, sources, match):
    with pytest.raises(ValueError, match=match):
        DualTokenChatDataset(sources, encoder)


def test_broken_image_is_named_or_another_sample_stands_in(processor, tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no image")
    examples = [chat([(str(tmp_path / f"{number}.png"),)], ["ok " * (number + 1)]) for number in range(2)]
    with pytest.raises(ValueError, match=r"The sample 1 of the examples cannot be trained on: its image .*1.png"):
        dataset_of(examples, processor)[1]
    dataset = dataset_of(examples, processor, on_bad_sample="skip")
    assert dataset.num_skipped == 0
    assert torch.equal(dataset[1]["input_ids"], dataset[0]["input_ids"])
    assert dataset[1]["num_skipped"] == 1 and dataset[0]["num_skipped"] == 0
    (tmp_path / "1.png").unlink()  # it is not read again
    assert dataset[1]["num_skipped"] == 1
    with pytest.raises(
        ValueError,
        match="None of the 1 samples from number 0 on can be read. The last: The sample 0 of the examples is",
    ):
        dataset_of(examples[1:], processor, on_bad_sample="skip")[0]


def test_images_with_and_without_codes_do_not_mix(processor, encoder, tmp_path):
    write_images(tmp_path, 1)
    pixels = chat([(str(tmp_path / "0.png"),)], ["b"])
    mixed = {"messages": [say("user", coded(1), (str(tmp_path / "0.png"),)), say("assistant", "b")]}
    with pytest.raises(BadSampleError, match="All 2 image parts .* 1 carry an image and 1 codes"):
        encoder.sample(encoder.encode(mixed), "")
    dataset = dataset_of([pixels, ANSWER], processor)
    with pytest.raises(
        ValueError, match="some samples of a batch have images as pixels and others as codes|Some samples"
    ):
        DualTokenDataCollator(0)([dataset[0], dataset[1]])


def test_codes_that_cannot_be_the_tokenizers_are_bad(processor):
    small = {"type": "image", "pixel_codes": np.zeros((2, 2, 4), int), "semantic_codes": np.zeros((2, 2, 4), int)}
    dataset = dataset_of([chat([small], ["b"]), chat([small, coded(1)], ["b"])], processor)
    for index, shapes in ((0, r"\(2, 2, 4\)"), (1, r"\(2, 2, 4\), \(3, 3, 3\)")):
        with pytest.raises(
            ValueError, match=rf"The sample {index} of .*one shape \(H, W, D\) with H \* W = 9, got {shapes}"
        ):
            dataset[index]


def test_template_that_refuses_a_chat(processor):
    processor = copy.deepcopy(processor)
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="The sample 0 of the examples .*cannot be rendered .roles must alternate"):
        dataset_of([TEXT], processor)


def test_long_samples_are_cut_before_an_image(processor):
    example = {"content": [{"type": "text", "text": "A blue one: "}, coded(1), coded(2)]}
    whole = dataset_of([example], processor)[0]
    start = int((whole["input_ids"] == processor.image_start_token_id).nonzero()[1])
    for max_length in (start, start + 1, start + N + 1):
        dataset = dataset_of([example], processor, max_length=max_length, cut_long_samples=True)
        assert torch.equal(dataset[0]["input_ids"], whole["input_ids"][:start])
        assert len(dataset[0]["pixel_codes"]) == 1 and dataset.num_cut == 1
    dataset = dataset_of([example], processor, max_length=start + N + 2, cut_long_samples=True)
    assert len(dataset[0]["pixel_codes"]) == 2 and len(dataset[0]["input_ids"]) == start + N + 2
    with pytest.raises(ValueError, match="nothing to learn is left before `max_length` = 8"):
        dataset_of([DRAWING], processor, max_length=8, cut_long_samples=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"cut_long_samples": True}, "needs a `max_length`"),
        ({"prompt_drop_probability": 1.1}, "must be a number from 0 to 1, got 1.1"),
        ({"on_bad_sample": "warn"}, "must be 'error' or 'skip', got 'warn'"),
    ],
)
def test_settings_out_of_range(processor, options, message):
    with pytest.raises(ValueError, match=message):
        dataset_of([TEXT], processor, **options)


# Mixtures


def source(name: str, count: int, weight: float | None) -> ChatSource:
    examples = [{"content": f"{name} {number}"} for number in range(count)]
    return ChatSource(name, examples, dict, weight)


def texts(dataset, epoch: int) -> list[str]:
    dataset.set_epoch(epoch)
    return [dataset.encoder.processor.decode(dataset[i]["input_ids"][:-1]) for i in range(len(dataset))]


def test_sources_without_weights_come_once_an_epoch(processor, encoder):
    dataset = DualTokenChatDataset([source("a", 3, None), source("b", 2, None)], encoder)
    assert texts(dataset, 0) == texts(dataset, 1) == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert dataset.lengths.tolist() == [len(dataset[index]["input_ids"]) for index in range(5)]
    with pytest.raises(ValueError, match="Either all sources of a mixture have a weight or none"):
        DualTokenChatDataset([source("a", 3, 1), source("b", 2, None)], encoder)
    with pytest.raises(IndexError):
        dataset[5]


def test_weighted_sources_go_round(encoder):
    dataset = DualTokenChatDataset([source("a", 7, 1), source("b", 3, 1.5)], encoder, seed=4)
    epochs = [texts(dataset, epoch) for epoch in range(7)]
    assert len(dataset) == 10
    for epoch in epochs:
        assert [text[0] for text in epoch] == ["a"] * 4 + ["b"] * 6
    # Each source goes on where it stopped: before any sample of it comes again, all have come.
    for name, count in (("a", 7), ("b", 3)):
        seen = [text for text in itertools.chain(*epochs) if text[0] == name]
        cycles = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
        assert all(len(set(cycle)) == count for cycle in cycles)
        assert len({tuple(cycle) for cycle in cycles}) > 1
    assert texts(dataset, 3) == epochs[3]
    other = DualTokenChatDataset([source("a", 7, 1), source("b", 3, 1.5)], encoder, seed=5)
    assert texts(other, 0) != epochs[0]
    dataset.set_epoch(2)
    assert dataset.lengths.tolist() == [len(dataset[index]["input_ids"]) for index in range(10)]


def table(tmp_path, count: int) -> ChatSource:
    """Rows in the cache of `datasets`, each with an image file."""
    rows = datasets.Dataset.from_list([{"path": str(tmp_path / f"{n}.png")} for n in range(count)])
    rows.save_to_disk(tmp_path / "rows")
    return ChatSource("rows", datasets.load_from_disk(tmp_path / "rows"), to_question, None)


def to_question(row: dict) -> dict:
    if not os.path.exists(row["path"]):
        raise BadSampleError(f"{row['path']} is missing")
    return chat([(row["path"],)], ["ok"])


def test_tokenising_in_processes_changes_nothing(processor, tmp_path):
    write_images(tmp_path, 12)
    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    one = DualTokenChatDataset([table(tmp_path, 12)], encoder)
    # Another limit, so that nothing is found in the cache.
    other = pickle.loads(pickle.dumps(ChatEncoder(processor, max_length=500, prompt_drop_probability=0)))
    two = DualTokenChatDataset([table(tmp_path, 12)], other, num_workers=2)
    assert one.digest == two.digest
    for index in range(12):
        assert all(torch.equal(one[index][key], two[index][key]) for key in ("input_ids", "labels", "pixel_values"))
    with pytest.raises(ValueError, match="The sample 13 of rows cannot be trained on: .*13.png is missing"):
        write_images(tmp_path, 13)
        DualTokenChatDataset([table(tmp_path, 14)], encoder, num_workers=2)


def test_ids_are_cached_until_something_changes(processor, tmp_path, monkeypatch):
    write_images(tmp_path, 2)
    source = table(tmp_path, 3)
    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    calls = []
    monkeypatch.setattr(
        ChatEncoder,
        "encode",
        lambda self, example, encode=ChatEncoder.encode: calls.append(1) or encode(self, example),
    )
    with pytest.raises(ValueError, match=r"The sample 2 of rows cannot be trained on: .*2.png is missing"):
        DualTokenChatDataset([source], encoder)
    first = DualTokenChatDataset([source], encoder, on_bad_sample="skip")
    assert len(first) == 2 and first.num_skipped == 1
    calls.clear()
    again = DualTokenChatDataset([table(tmp_path, 3)], encoder, on_bad_sample="skip")
    assert not calls and again.digest == first.digest
    assert torch.equal(again[1]["input_ids"], first[1]["input_ids"])

    # The fault is mended, and is not remembered.
    write_images(tmp_path, 3)
    mended = DualTokenChatDataset([source], encoder, on_bad_sample="skip")
    assert len(mended) == 3 and mended.num_skipped == 0 and mended.digest != first.digest
    calls.clear()
    DualTokenChatDataset([source], ChatEncoder(processor, max_length=90, prompt_drop_probability=0))
    assert len(calls) == 3


# Batches


def test_collator_pads_on_the_right_and_joins_images():
    def sample(length, images):
        item = {"input_ids": torch.arange(length), "labels": torch.arange(length)}
        return {**item, "pixel_codes": torch.full((images, 3, 3, 3), length)} if images else item

    batch = DualTokenDataCollator(99)([sample(2, 1), sample(5, 0), sample(3, 2)])
    assert batch["input_ids"][0].tolist() == [0, 1] + [99] * 3
    assert batch["labels"][2].tolist() == [-100, 1, 2] + [-100] * 2
    assert batch["attention_mask"].sum(1).tolist() == [2, 5, 3]
    assert batch["pixel_codes"][:, 0, 0, 0].tolist() == [2, 3, 3]
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_codes"}


def test_pack_fills_few_rows():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 40, size=rng.integers(1, 30)).tolist()
        capacity = int(rng.integers(20, 90))
        rows = pack(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        fills = [sum(lengths[index] for index in row) for row in rows]
        assert all(fill <= capacity or len(row) == 1 for row, fill in zip(rows, fills))
        # Two half-empty rows would be one.
        smallest = sorted(fill for row, fill in zip(rows, fills) if fill <= capacity)[:2]
        assert len(smallest) < 2 or sum(smallest) > capacity or len(rows) <= -(-sum(lengths) // capacity) + 1
    assert pack([5, 5, 5, 5], 10) == [[0, 2], [1, 3]]
    assert pack([30], 10) == [[0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "one row"])
def test_packed_equals_padded_in_losses_and_gradients(processor, model, attention, monkeypatch):
    """Samples that share a row do not see each other."""
    model = copy.deepcopy(model).train()
    if attention == "one row":
        # What flash attention gets; its kernels are not for this device.
        monkeypatch.setattr(
            type(model.model),
            "_packs_rows",
            lambda self, mask, positions, cache: positions is not None and mask is None,
        )
    else:
        model.set_attn_implementation(attention)
    examples = [DRAWING, TEXT, ANSWER, DOCUMENT, TEXT, TEXT]
    dataset = dataset_of(examples, processor)
    samples = [dataset[index] for index in range(len(dataset))]
    longest = max(len(sample["input_ids"]) for sample in samples)
    padded = DualTokenDataCollator(0)(samples)
    packed = DualTokenDataCollator(0, packed_length=longest + 9)(samples)
    assert len(packed["input_ids"]) < len(samples) - 1 and "attention_mask" not in packed
    assert packed["input_ids"].numel() < 0.75 * padded["input_ids"].numel()
    results = []
    for batch in (padded, packed):
        batch.pop("num_skipped")
        output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (one, one_gradients), (other, other_gradients) = results
    for name in ("loss", "text_loss", "pixel_loss", "semantic_loss"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)
    assert one.num_text_targets == other.num_text_targets and one.num_visual_targets == other.num_visual_targets
    assert one_gradients.keys() == other_gradients.keys()
    for name, gradient in one_gradients.items():
        assert (gradient - other_gradients[name]).abs().max() < 1e-4 * gradient.abs().max().clamp(min=1e-3), name
    # The comparison would notice: without positions the samples of a row do see each other.
    packed.pop("position_ids")
    assert (model(**packed).loss - one.loss).abs() > 1e-3


def test_packed_rows_stay_apart_in_evaluation(processor, model):
    """transformers forgets about packed rows where there is a cache, which a model in eval mode makes by default."""
    dataset = dataset_of([TEXT, ANSWER, TEXT], processor)
    samples = [dataset[index] for index in range(3)]
    with torch.no_grad():
        padded = model(**DualTokenDataCollator(0)(samples))
        packed = model(**DualTokenDataCollator(0, packed_length=500)(samples))
    assert packed.logits.shape[0] == 1
    torch.testing.assert_close(padded.loss, packed.loss, rtol=1e-5, atol=1e-5)


# Streams


def streamed(name: str, count: int, weight: float | None = None, shards: int = 2) -> ChatSource:
    rows = datasets.Dataset.from_dict({"text": [f"{name} {number}" for number in range(count)]})
    return ChatSource(name, rows.to_iterable_dataset(num_shards=shards), to_document, weight)


def to_document(row: dict) -> dict:
    if row["text"].endswith("3"):
        raise BadSampleError("it ends in a three")
    return {"content": row["text"]}


def first(stream, count, num_workers=0, batch_size=2) -> list[dict]:
    loader = DataLoader(stream, batch_size, collate_fn=DualTokenDataCollator(0), num_workers=num_workers)
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    if num_workers:
        iterator._shutdown_workers()
    return batches


def test_stream_mixes_by_weight_and_counts_what_it_skips(encoder):
    sources = [streamed("a", 10, 3.0), streamed("b", 4, 1.0)]
    stream = DualTokenChatStream(sources, encoder, on_bad_sample="skip", shuffle_buffer_size=4, seed=1)
    batches = first(stream, 200)
    ids = [ids[ids != 0] for batch in batches for ids in batch["input_ids"]]
    words = [encoder.processor.decode(row)[:3] for row in ids]
    share = sum(word[0] == "a" for word in words) / len(words)
    assert 0.7 < share < 0.85
    counts = collections.Counter(words)
    assert set(counts) == {f"a {n}" for n in range(10) if n != 3} | {f"b {n}" for n in range(3)}
    # Every sample of a source comes as often as the others.
    of_a = [count for word, count in counts.items() if word[0] == "a"]
    assert max(of_a) - min(of_a) <= 1
    skipped = sum(int(batch["num_skipped"]) for batch in batches)
    assert skipped == pytest.approx(share * 400 / 9 + (1 - share) * 400 / 3, abs=4)


def test_stream_refuses_bad_samples_and_mixtures_without_weights(encoder):
    with pytest.raises(ValueError, match="cannot be trained on: it ends in a three. Mend it"):
        first(DualTokenChatStream([streamed("a", 5)], encoder), 5)
    with pytest.raises(ValueError, match="Streams have no length by which 2 of them could be mixed"):
        DualTokenChatStream([streamed("a", 5), streamed("b", 5)], encoder)


def test_stream_counts_what_it_cuts(processor):
    encoder = ChatEncoder(processor, max_length=4, cut_long_samples=True, prompt_drop_probability=0)
    batches = first(
        DualTokenChatStream(
            [
                streamed("A blue one, a", 2),
            ],
            encoder,
        ),
        3,
    )
    assert [int(batch["num_cut"]) for batch in batches] == [2, 2, 2]
    assert all(batch["input_ids"].shape == (2, 4) for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_mixture_equals_the_uninterrupted_one(processor, num_workers):
    encoder = ChatEncoder(processor, prompt_drop_probability=0.5)

    def stream(rank):
        sources = [streamed("a", 23, 3.0, shards=3), streamed("b", 9, 1.0, shards=8)]
        return DualTokenChatStream(
            sources, encoder, on_bad_sample="skip", shuffle_buffer_size=4, seed=1, rank=rank, world_size=2
        )

    for rank in range(2):
        expected = first(stream(rank), 20, num_workers)
        for stop in (1, 7, 12):
            progress = StreamProgress()
            for batch in expected[:stop]:
                progress.update(batch["stream_position"])
            resumed = stream(rank)
            resumed.load_state_dict(json.loads(json.dumps(progress.state_dict())))
            for batch, reference in zip(first(resumed, 20 - stop, num_workers), expected[stop:]):
                assert all(torch.equal(batch[key], reference[key]) for key in ("input_ids", "labels", "num_skipped"))


def test_an_empty_batch_is_named():
    for collate in (DualTokenDataCollator(0), DualTokenDataCollator(0, packed_length=8), collate_images):
        with pytest.raises(ValueError, match="at least one sample, got none"):
            collate([])
