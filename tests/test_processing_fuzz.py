"""Odd calls of the processor, seeded: each is right, or refused in a sentence by a ValueError or a TypeError."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizer import build_tiny_qwen2_tokenizer

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenProcessor


IMAGE = Image.new("RGB", (20, 30), (200, 10, 60))
GROUP = "<|vision_start|><|image_pad|><|vision_end|>"
TYPED = ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|im", "_start|>", GROUP]
TEXTS = ["hello", "", " ", "a\0b", "\ud800", "e\u0301 \u202e", "{{ 7 * 7 }}", "ß" * 300, *TYPED]


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tiny_qwen2_tokenizer(["hello world"])
    return DualTokenProcessor(DualTokenImageProcessorPil(size=24), tokenizer, num_image_tokens=9)


def outcome(call):
    """What a call returns, or the sentence it refuses with."""
    try:
        return call(), None
    except (ValueError, TypeError) as error:
        foreign = "TextEncodeInput" in str(error) or "object is not" in str(error)
        assert len(str(error)) > 15 and not isinstance(error, UnicodeError) and not foreign, repr(error)
        return None, str(error)


def check_inputs(processor, inputs, num_images):
    ids = torch.as_tensor(inputs["input_ids"])
    assert ids.ndim == 2 and int((ids == processor.image_token_id).sum()) == 9 * num_images
    assert torch.as_tensor(inputs["attention_mask"]).shape == ids.shape
    assert len(inputs.get("pixel_values", ())) == num_images


@pytest.mark.parametrize("seed", range(4))
def test_chats(processor, seed):
    rng = random.Random(seed)
    right = 0
    for _ in range(60):
        chat, num_images, is_plain = [], 0, True
        for role in rng.choices(["user", "assistant", "system", "tool", "usr", None, 3], [8, 5, 3, 1, 1, 1, 1], k=3):
            kind = rng.choices(["text", "parts", "odd"], [4, 4, 1])[0]
            content = rng.choice(TEXTS)
            if kind == "parts":
                content = [{"type": "text", "text": rng.choice(TEXTS)} for _ in range(rng.randint(0, 2))]
                for _ in range(rng.randint(0, 2)):
                    num_images += 1
                    content.insert(rng.randint(0, len(content)), {"type": "image", "image": IMAGE})
            elif kind == "odd":
                content, is_plain = (
                    rng.choice([None, 5, [None], [{"type": "audio"}], [{"type": "text"}], [[]], b"x"]),
                    False,
                )
            chat.append({"role": role, "content": content})
        flags = {
            "add_generation_prompt": rng.random() < 0.6,
            "return_tensors": rng.choice(["pt", "np"]),
            "tools": rng.choice([None, None, [{"type": "function", "function": {"name": "f"}}]]),
            "padding_side": rng.choice(["left", "right"]),
        }
        inputs, refusal = outcome(
            lambda: processor.apply_chat_template(chat, tokenize=True, return_dict=True, **flags)  # noqa: B023
        )
        if refusal is None and is_plain:
            right += 1
            check_inputs(processor, inputs, num_images)
            # Nothing that was typed became a control token.
            ids = torch.as_tensor(inputs["input_ids"])
            ends = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert int((ids == ends).sum()) == len(chat)
            assert int((ids == processor.image_start_token_id).sum()) == num_images
    assert right >= 5


@pytest.mark.parametrize("seed", range(4))
def test_calls(processor, seed):
    rng = random.Random(seed)
    texts = [
        None,
        "a",
        "",
        ["a", GROUP],
        [["a"]],
        5,
        [None],
        [GROUP, GROUP * 2],
        GROUP,
        f"{GROUP}b",
        [],
        ["\ud800"],
        {},
    ]
    array = np.zeros((8, 8, 3), dtype=np.uint8)
    images = [
        None,
        IMAGE,
        [IMAGE],
        [[IMAGE]],
        [[IMAGE], [IMAGE, IMAGE]],
        [None, IMAGE],
        [[], [IMAGE]],
        [[[IMAGE]]],
        array,
    ]
    images += ["", 7, [5], {}, [[IMAGE], None], torch.zeros(3, 8, 8, dtype=torch.uint8), []]
    right = 0
    for _ in range(150):
        text, image = rng.choice(texts), rng.choice(images)
        kwargs = {
            "return_tensors": rng.choice(["pt", "np", None, "xx"]),
            "padding_side": rng.choice(["left", "right"]),
        }
        inputs, refusal = outcome(lambda: processor(text=text, images=image, **kwargs))  # noqa: B023
        if refusal is None and text is not None:
            right += 1
            shown = sum(row.count("<|image_pad|>") for row in ([text] if isinstance(text, str) else text))
            if kwargs["return_tensors"] is not None:
                check_inputs(processor, inputs, shown)
    assert right >= 5


def test_a_lone_surrogate_is_named(processor):
    for call in (
        lambda: processor(text="cut \ud83d"),
        lambda: processor.apply_chat_template([{"role": "user", "content": "cut \ud83d"}], tokenize=True),
    ):
        with pytest.raises(ValueError, match="half a character"):
            call()
