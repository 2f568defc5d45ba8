"""Text mode: transformers' own generate, with images in the prompt and none in the answer."""

import copy

import pytest
import torch
import transformers
from generation_helpers import (
    END,
    EOS,
    IMAGE,
    IMAGES_BEFORE,
    PAD,
    PICTURE,
    ROWS,
    START,
    Recorder,
    ids,
    pad_left,
    push,
    random_codes,
    shared_model,
    take,
)
from tiny_models import lively_unified_model
from transformers import (
    GenerationConfig,
)


class TestText:
    def test_left_padded_batch_equals_single_rows(self):
        model, codes = shared_model(), random_codes(3)
        batch = model.generate(**pad_left(ROWS), **codes, max_new_tokens=6, eos_token_id=None)
        for index, (row, images) in enumerate(zip(ROWS, IMAGES_BEFORE)):
            alone = model.generate(ids(*row), **take(codes, images), max_new_tokens=6, eos_token_id=None)
            assert torch.equal(alone[0, -6:], batch[index, -6:])
        assert len(batch[:, -6:].unique(dim=0)) == 3

    @pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}])
    def test_caches(self, settings):
        model, codes = shared_model(), random_codes(3)
        arguments = {**pad_left(ROWS), **codes, "max_new_tokens": 6, "eos_token_id": None}
        assert torch.equal(model.generate(**arguments, **settings), model.generate(**arguments))

    def test_greedy_is_the_argmax_of_the_full_forward(self, model):
        codes, row = random_codes(1), [8, *PICTURE, 9]
        out = model.generate(ids(*row), **codes, max_new_tokens=6, eos_token_id=None)
        logits = model(out, **codes).logits[:, len(row) - 1 : -1]
        logits[..., [START, IMAGE, END]] = float("-inf")
        assert torch.equal(logits.argmax(-1), out[:, len(row) :])

    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 50.0}])
    def test_image_ids_are_suppressed(self, model, settings):
        wishes = [] if settings.get("do_sample") else [push(START, IMAGE, END)]
        prompt = ids(5, 6).repeat(16, 1)
        out = model.generate(prompt, max_new_tokens=20, logits_processor=wishes, eos_token_id=None, **settings)
        assert not torch.isin(out, torch.tensor([START, IMAGE, END])).any()
        # The caller's own list is kept beside it.
        out = model.generate(prompt, max_new_tokens=2, suppress_tokens=[7], logits_processor=[push(7, START)])
        assert not torch.isin(out, torch.tensor([7, START])).any()

    def test_continuous_batching(self):
        """As plain text generation, whatever generation config is given; image tokens are barred and images refused."""
        model = lively_unified_model()
        with torch.no_grad():
            model.lm_head.weight[[START, IMAGE, END]] *= 50
        config = GenerationConfig(max_new_tokens=4, eos_token_id=EOS, pad_token_id=PAD, guidance_scale=3.0)
        if transformers.__version__.split(".")[1] in map(str, range(6, 17)):
            with pytest.raises(NotImplementedError, match="needs transformers 5.17 or later"):
                model.generate_batch([[5, 6]], generation_config=config)
            return
        # By default its buffers fill the memory that is free.
        sizes = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        out = model.generate_batch([[5, 6], [7, 8, 9]], generation_config=config, continuous_batching_config=sizes)
        for name, row in {"req_0": [5, 6], "req_1": [7, 8, 9]}.items():
            alone = model.generate(ids(*row), max_new_tokens=4, eos_token_id=EOS)[0, len(row) :].tolist()
            assert out[name].generated_tokens == alone and not {START, IMAGE, END} & set(alone)
        with pytest.raises(ValueError, match=r"takes no images, but prompts \[1\] hold some"):
            model.generate_batch([[5], PICTURE], generation_config=config)

    def test_image_ids_are_suppressed_with_a_generation_config(self, model):
        config = GenerationConfig(max_new_tokens=6, suppress_tokens=[7], guidance_scale=4.0)
        out = model.generate(ids(5, 6), generation_config=config, logits_processor=[push(START, IMAGE, END, 7)])
        assert not torch.isin(out, torch.tensor([START, IMAGE, END, 7])).any()
        assert config.suppress_tokens == [7] and config.guidance_scale == 4.0  # the caller's

    def test_beams_with_images(self, model):
        codes = random_codes(3)
        arguments = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
        batch = model.generate(**pad_left(ROWS), **codes, **arguments)
        assert len(batch) == 6
        for index, (row, images) in enumerate(zip(ROWS, IMAGES_BEFORE)):
            alone = model.generate(ids(*row), **take(codes, images), **arguments)
            assert torch.equal(alone[:, -5:], batch[2 * index : 2 * index + 2, -5:])

    def test_several_sampled_with_images(self, model):
        codes = random_codes(3)
        out = model.generate(
            **pad_left(ROWS), **codes, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2
        )
        greedy = model.generate(**pad_left(ROWS), **codes, max_new_tokens=5)
        assert torch.equal(out, greedy.repeat_interleave(2, 0))

    def test_inputs_embeds_with_images(self, model):
        codes, prompt = random_codes(3), pad_left(ROWS)
        embeds = {
            "inputs_embeds": model.get_input_embeddings()(prompt["input_ids"]),
            "attention_mask": prompt["attention_mask"],
        }
        for settings in ({}, {"num_beams": 2}):
            arguments = {**codes, "max_new_tokens": 5, "eos_token_id": None, **settings}
            assert torch.equal(model.generate(**embeds, **arguments), model.generate(**prompt, **arguments)[:, -5:])

    @pytest.mark.parametrize("with_image", [False, True])
    def test_assisted(self, model, with_image):
        row, codes = ([8, *PICTURE, 9], random_codes(1)) if with_image else ([8, 9], {})
        greedy = model.generate(ids(*row), **codes, max_new_tokens=8, eos_token_id=None)
        assisted = model.generate(
            ids(*row), **codes, max_new_tokens=8, eos_token_id=None, assistant_model=shared_model()
        )
        assert torch.equal(assisted, greedy)

    @pytest.mark.parametrize("new_image", [False, True])
    def test_goes_on_from_a_cache(self, model, new_image):
        """A second turn feeds the new tokens, and the new images, only."""
        codes = random_codes(2)
        arguments = {"max_new_tokens": 4, "eos_token_id": None}
        first = model.generate(
            ids(8, *PICTURE, 9), **take(codes, slice(0, 1)), return_dict_in_generate=True, **arguments
        )
        turn = ids(7, *PICTURE, 6) if new_image else ids(7, 6)
        sequence = torch.cat([first.sequences, turn], dim=1)
        new_codes, all_codes = (take(codes, slice(start, 1 + new_image)) for start in (1, 0))
        again = copy.deepcopy(first.past_key_values)
        second = model.generate(sequence, **new_codes, past_key_values=first.past_key_values, **arguments)
        assert torch.equal(second, model.generate(sequence, **all_codes, **arguments))
        # The codes of the whole conversation do as well.
        assert torch.equal(second, model.generate(sequence, **all_codes, past_key_values=again, **arguments))

    def test_prompt_lookup(self, model):
        row, codes = [8, *PICTURE, 9, 8, 9], random_codes(1)
        # An id that text never holds; transformers before 5.13 fails without any.
        arguments = {**codes, "max_new_tokens": 8, "eos_token_id": IMAGE}
        assert torch.equal(
            model.generate(ids(*row), **arguments, prompt_lookup_num_tokens=2), model.generate(ids(*row), **arguments)
        )

    def test_guidance_has_no_effect(self, model, forward_rows):
        plain = model.generate(ids(5, 6), max_new_tokens=5, eos_token_id=None)
        count = len(forward_rows)
        assert torch.equal(model.generate(ids(5, 6), max_new_tokens=5, eos_token_id=None, guidance_scale=7.0), plain)
        assert len(forward_rows) == 2 * count

    def test_streamer(self, model):
        streamer = Recorder()
        out = model.generate(ids(5, 6), max_new_tokens=4, eos_token_id=None, streamer=streamer)
        assert streamer.values[0] == [5, 6] and sum(streamer.values, []) == out[0].tolist() and streamer.ended == 1

    def test_dict_output(self, model):
        out = model.generate(
            ids(5, 6), max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
        )
        assert len(out.scores) == len(out.hidden_states) == out.sequences.shape[1] - 2

    def test_pixels_equal_their_codes(self, model, pixel_values):
        encoded = model.vision_tokenizer.encode(pixel_values)
        row = ids(*PICTURE, 5, *PICTURE)
        assert torch.equal(
            model.generate(row, pixel_values=pixel_values, max_new_tokens=5),
            model.generate(
                row, pixel_codes=encoded.pixel_codes, semantic_codes=encoded.semantic_codes, max_new_tokens=5
            ),
        )
