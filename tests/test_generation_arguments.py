"""Prompts, images and options that `generate` refuses, each in a sentence."""

import math

import pytest
import torch
from generation_helpers import (
    GREEDY,
    GREEDY_IMAGES,
    IMAGE,
    PAD,
    PICTURE,
    START,
    VOCAB,
    N,
    Recorder,
    ids,
    random_codes,
)
from transformers import DynamicCache, GenerationConfig


class TestBadArguments:
    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    @pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
    def test_guidance_scale(self, model, mode, scale):
        with pytest.raises(ValueError, match="`guidance_scale` must be a number from 0"):
            model.generate(ids(5), generation_mode=mode, guidance_scale=scale)

    def test_mode(self, model):
        with pytest.raises(ValueError, match="must be one of 'text', 'image', 'interleaved', got 'video'"):
            model.generate(ids(5), generation_mode="video")

    @pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
    @pytest.mark.parametrize(
        "prompt, message",
        [
            (torch.zeros(1, 0, dtype=torch.long), "with at least one token"),
            (torch.zeros(0, 3, dtype=torch.long), "at least one row"),
            (torch.tensor([5, 6]), "ids of shape"),
            (torch.tensor([[5, VOCAB]]), "ids from 0 to 59, the vocabulary's, got ids from 5 to 60"),
            (torch.tensor([[-1, 5]]), "got ids from -1 to 5"),
        ],
    )
    def test_prompt_that_is_none(self, model, mode, prompt, message):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, generation_mode=mode)

    @pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
    def test_codes_of_other_kinds(self, model, mode):
        codes = random_codes(1)
        arguments = {"generation_mode": mode, "max_new_tokens": N + 1}
        expected = model.generate(ids(*PICTURE, 5), **codes, **arguments, **GREEDY_IMAGES.get(mode, {}))
        narrow = {name: kind.to(torch.uint16) for name, kind in codes.items()}
        out = model.generate(ids(*PICTURE, 5), **narrow, **arguments, **GREEDY_IMAGES.get(mode, {}))
        assert torch.equal(*(getattr(part, "sequences", part) for part in (out, expected)))
        for value in (24, -1):
            codes["pixel_codes"][0, 0, 0, 0] = value
            with pytest.raises(ValueError, match="`pixel_codes` must lie between 0 and 23"):
                model.generate(ids(*PICTURE, 5), **codes, **arguments)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_no_prompt(self, model, mode):
        with pytest.raises(ValueError, match="needs `input_ids`"):
            model.generate(generation_mode=mode)

    def test_rows_that_end_differently(self, model):
        with pytest.raises(ValueError, match=r"none; rows \[1\] do not"):
            model.generate(torch.tensor([[5, START], [6, 7]]), **GREEDY)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_right_padding(self, model, mode):
        prompt = {"input_ids": torch.tensor([[5, 6], [7, PAD]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        with pytest.raises(ValueError, match="padded on the left"):
            model.generate(**prompt, generation_mode=mode)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_mask_of_another_shape(self, model, mode):
        with pytest.raises(ValueError, match="`attention_mask` must have the shape of the ids"):
            model.generate(ids(5, 6), attention_mask=ids(1), generation_mode=mode)

    @pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
    @pytest.mark.parametrize("repeats", [1, 2])
    def test_images_that_do_not_fit(self, model, mode, repeats):
        settings = {"num_return_sequences": repeats, "generation_mode": mode}
        if mode == "text":
            settings |= {"do_sample": True, "max_new_tokens": 2}
        with pytest.raises(ValueError, match=r"2 image\(s\) were given.*hold 9"):
            model.generate(ids(5, *PICTURE, 6), **random_codes(2), **settings)

    @pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
    def test_pixels_and_codes(self, model, mode, pixel_values):
        with pytest.raises(ValueError, match="not as both"):
            model.generate(ids(*PICTURE, 5), pixel_values=pixel_values[:1], **random_codes(1), generation_mode=mode)

    @pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
    def test_one_kind_of_codes(self, model, mode):
        codes = random_codes(1)["pixel_codes"]
        with pytest.raises(ValueError, match="`semantic_codes` is missing"):
            model.generate(ids(*PICTURE, 5), pixel_codes=codes, generation_mode=mode, max_new_tokens=20)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_what_only_text_takes(self, model, mode):
        with pytest.raises(ValueError, match="does not take num_beams"):
            model.generate(ids(5), generation_mode=mode, num_beams=2)
        with pytest.raises(ValueError, match="does not take assistant_model"):
            model.generate(ids(5), generation_mode=mode, assistant_model=model)

    @pytest.mark.parametrize("name", ["negative_prompt_ids", "negative_prompt_attention_mask"])
    def test_what_text_does_not_take(self, model, name):
        with pytest.raises(ValueError, match=f"`{name}` belongs to image and interleaved generation"):
            model.generate(ids(5), max_new_tokens=1, **{name: ids(START)})
        model.generate(ids(5), max_new_tokens=1, **{name: None})

    def test_cache_implementation(self, model):
        with pytest.raises(ValueError, match="'static' or 'dynamic', got 'quantized'"):
            model.generate(ids(5), cache_implementation="quantized", **GREEDY)


# Ways to choose text, and outputs, that generation of images has not.
REFUSED = [
    {"penalty_alpha": 0.6},
    {"prompt_lookup_num_tokens": 2},
    {"constraints": ["a"]},
    {"force_words_ids": [[5]]},
    {"dola_layers": "low"},
    {"num_beam_groups": 2},
    {"diversity_penalty": 0.5},
    {"early_stopping": True},
    {"length_penalty": 2.0},
    {"token_healing": True},
    {"output_scores": True},
    {"output_hidden_states": True},
    {"prefix_allowed_tokens_fn": print},
    {"stopping_criteria": [print]},
    {"assistant_early_exit": 1},
    {"past_key_values": DynamicCache()},
]


@pytest.mark.parametrize(
    "mode, option",
    [
        ("image", {"max_time": 1.0}),
        ("image", {"streamer": Recorder()}),
        ("image", {"logits_processor": []}),
        ("interleaved", {"stop_strings": ["."]}),
        *((mode, option) for mode in ("image", "interleaved") for option in REFUSED),
    ],
)
def test_what_a_mode_cannot_do_is_refused(model, mode, option):
    with pytest.raises(ValueError, match=f"does not take {next(iter(option))}"):
        model.generate(torch.tensor([[5, 50]]), generation_mode=mode, max_new_tokens=20, **option)


def test_saved_guidance_does_not_reach_text(model, monkeypatch):
    """Not even with a generation config, whose unset fields transformers fills in from the model's."""
    plain = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, eos_token_id=None)
    monkeypatch.setattr(model.generation_config, "guidance_scale", 3.0)
    for arguments in ({}, {"generation_config": GenerationConfig(max_new_tokens=5)}):
        text = model.generate(torch.tensor([[5, 6]]), **{"max_new_tokens": 5, "eos_token_id": None, **arguments})
        assert torch.equal(text, plain)


def test_generation_config_asks_for_several_images(model):
    config = GenerationConfig(num_return_sequences=2, do_sample=True)
    out = model.generate(torch.tensor([[5, 50]]), generation_mode="image", generation_config=config)
    assert len(out.pixel_codes) == 2


def test_decode_images_of_a_text_answer_is_refused(model):
    with pytest.raises(ValueError, match="text mode returns ids"):
        model.decode_images(model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, eos_token_id=None))


def test_a_prompt_that_ends_within_an_image_is_refused(model):
    with pytest.raises(ValueError, match="must not end within an image"):
        model.generate(ids(5, START, *[IMAGE] * N), **random_codes(1), generation_mode="interleaved")
