"""Image mode against the full forward, the naive loop and single rows; positions, and negative prompts."""

import functools
import math

import numpy as np
import pytest
import torch
from generation_helpers import (
    CACHES,
    GREEDY,
    IMAGES_BEFORE,
    INTERLEAVED,
    PICTURE,
    ROWS,
    START,
    N,
    assert_codes,
    force,
    ids,
    naive,
    pad_left,
    pairs,
    random_codes,
    same_images,
    shared_model,
    take,
)
from naive.generation_loop import NaiveGenerator
from tiny_models import depth_logits, lively_unified_model, tiny_unified_config
from transformers import (
    GenerationConfig,
)


class TestPositions:
    """Rotary embeddings hide a common shift, so that wrong positions show nowhere but here."""

    PROMPT = pad_left([[5, 6, 7, START], [8, START]])

    def test_image(self, model, positions):
        model.generate(**self.PROMPT, **GREEDY)
        # Two prompts but for `<image_start>`, which the unconditional rows get too, alone at position 0.
        assert positions[0] == [[0, 1, 2], [0, 0, 0]]
        assert positions[1:] == [[[3 + n], [1 + n], [n], [n]] for n in range(N)]

    def test_interleaved(self, model, positions):
        plan = [{}, {1: START}]
        model.generate(
            **self.PROMPT, max_new_tokens=N + 3, eos_token_id=None, logits_processor=[force(plan, 4)], **INTERLEAVED
        )
        # The second row's prompt ends in <image_start> too: both draw at once.
        prompt, *steps = positions
        assert prompt == [[0, 1, 2], [0, 0, 0]]
        assert steps[: N + 1] == [[[3 + n], [1 + n], [n], [n]] for n in range(N + 1)]
        # `<image_end>`, and what comes after it, is of no concern to the unconditional rows.
        assert steps[N + 1 :] == [[[4 + N + n], [2 + N + n]] for n in range(len(steps) - N - 1)]

    def test_interleaved_second_image(self, model, positions):
        negative = ids(9, 10, START)
        plan = [{1: START, 13: START}]
        model.generate(
            ids(5),
            negative_prompt_ids=negative,
            max_new_tokens=2 * N + 6,
            eos_token_id=None,
            logits_processor=[force(plan, 1)],
            **INTERLEAVED,
        )
        # The negative prompt once, without its last token; then for every image 2 (its <image_start>) to N + 2.
        assert positions[:2] == [[[0, 1]], [[0]]]
        assert [step[0] for step in positions[2:]] == [[1 + n] for n in range(2 * N + 5)]
        assert [step[1] for step in positions[2:] if len(step) == 2] == [[2 + n] for n in range(N + 1)] * 2

    def test_text(self, model, positions):
        model.generate(**self.PROMPT, max_new_tokens=3, eos_token_id=None)
        assert [row[-1] for row in positions[0]] == [3, 1]
        assert positions[1:] == [[[4], [2]], [[5], [3]]]


class TestImage:
    def test_greedy_is_the_argmax_chain_of_the_full_forward(self):
        model = shared_model()
        out = model.generate(ids(5, 6, 7, START), guidance_scale=1.0, **GREEDY)
        assert out.sequences.tolist() == [[5, 6, 7, *PICTURE]]
        codes = {"pixel_codes": out.pixel_codes, "semantic_codes": out.semantic_codes}
        states = model(out.sequences, **codes).last_hidden_state[0, 3 : 3 + N]
        vectors = model.model.code_embeds(*(kind.flatten(1, 2)[0] for kind in codes.values()))
        assert_codes(out, *depth_logits(model.depth_heads, states, vectors).argmax(-1))
        # The test is worth something: positions and kinds differ.
        assert all(len(kind.flatten(0, 2).unique(dim=0)) > 2 for kind in codes.values())
        assert not torch.equal(out.pixel_codes, out.semantic_codes)

    @CACHES
    @pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
    def test_equals_the_naive_loop(self, scale, cache):
        out = shared_model().generate(ids(5, 6, 7, START), guidance_scale=scale, cache_implementation=cache, **GREEDY)
        assert_codes(out, *naive().image([5, 6, 7, START], guidance_scale=scale))

    @CACHES
    def test_equals_the_naive_loop_with_images_on_both_sides(self, cache):
        """Image to image, guided by a negative prompt that has an image of its own."""
        codes, negative = random_codes(1), random_codes(1, seed=6)
        prompt, negative_prompt = [5, *PICTURE, 6, START], [*PICTURE, 7, START]
        out = shared_model().generate(
            ids(*prompt),
            **codes,
            negative_prompt_ids=ids(*negative_prompt),
            **{f"negative_{name}": kind for name, kind in negative.items()},
            guidance_scale=2.0,
            cache_implementation=cache,
            **GREEDY,
        )
        expected = naive().image(prompt, pairs(codes), negative_prompt, pairs(negative), 2.0)
        assert_codes(out, *expected)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_per_depth_codebooks_of_one_kind(self, mode):
        fields = tiny_unified_config().vision_tokenizer_config.to_dict()
        fields["pixel_quantizer_config"]["shared_codebook"] = False
        model = lively_unified_model(vision_tokenizer_config=fields)
        arguments = {**GREEDY, "generation_mode": mode, "max_new_tokens": N + 1}
        out = model.generate(ids(5, START), guidance_scale=2.5, **arguments)
        assert_codes(out, *NaiveGenerator(model).image([5, START], guidance_scale=2.5))

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_bfloat16(self, mode):
        model = lively_unified_model().to(torch.bfloat16)
        out = model.generate(
            **pad_left([[5, START], [*PICTURE, START]]), **random_codes(1), generation_mode=mode, max_new_tokens=N + 1
        )
        assert out.pixel_codes.shape == (2, 3, 3, 3)
        assert model.decode_images(out).dtype == torch.bfloat16

    def test_guidance_matters(self, model):
        images = [model.generate(ids(5, 6, 7, START), guidance_scale=s, **GREEDY).pixel_codes for s in (0, 1, 2.5)]
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])

    def test_the_default_scale_is_three(self, model):
        prompt = ids(5, 6, 7, START)
        default = model.generate(prompt, **GREEDY)
        assert same_images(default, model.generate(prompt, guidance_scale=3.0, **GREEDY))
        assert not same_images(default, model.generate(prompt, guidance_scale=1.0, **GREEDY))

    def test_the_scale_of_a_generation_config(self, model):
        prompt = ids(5, 6, 7, START)
        config = GenerationConfig(guidance_scale=1.0)
        assert same_images(
            model.generate(prompt, generation_config=config, **GREEDY),
            model.generate(prompt, guidance_scale=1.0, **GREEDY),
        )

    def test_scale_one_runs_no_unconditional_rows(self, model, forward_rows):
        prompt = {**pad_left([[5, 6, 7, START], [8, START]])}
        plain = model.generate(**prompt, guidance_scale=1.0, **GREEDY)
        # The prompt, its <image_start>, then every position but the last, whose state nobody needs.
        assert forward_rows == [2] * (1 + N)
        forward_rows.clear()
        guided = model.generate(**prompt, guidance_scale=1.0 + 1e-7, **GREEDY)
        assert forward_rows == [2] + [4] * N
        assert same_images(plain, guided)

    def test_scale_zero_is_unconditional(self, model):
        without = model.generate(ids(5, 6, 7, START), guidance_scale=0, **GREEDY)
        assert same_images(without, model.generate(ids(START), guidance_scale=1, **GREEDY))

    @pytest.mark.parametrize("scale", [1.0, 2.5])
    @CACHES
    def test_left_padded_batch_equals_single_rows(self, scale, cache):
        model, codes = shared_model(), random_codes(3)
        batch = model.generate(**pad_left(ROWS), **codes, guidance_scale=scale, cache_implementation=cache, **GREEDY)
        assert batch.image_owner.tolist() == [0, 1, 2]
        for index, (row, images) in enumerate(zip(ROWS, IMAGES_BEFORE)):
            alone = model.generate(ids(*row), **take(codes, images), guidance_scale=scale, **GREEDY)
            assert torch.equal(alone.pixel_codes[0], batch.pixel_codes[index])
            assert torch.equal(alone.semantic_codes[0], batch.semantic_codes[index])
            # `<image_start>` was added; the row's padding stays in front.
            assert batch.sequences[index].tolist()[-len(row) - N - 2 :] == [*row, *PICTURE]

    def test_a_masked_prompt_is_no_prompt(self):
        model, prompt = shared_model(), ids(8, *PICTURE, 9, START)
        mask = torch.zeros_like(prompt)
        mask[:, -1] = 1
        masked = model.generate(prompt, attention_mask=mask, **random_codes(1), guidance_scale=1.0, **GREEDY)
        assert same_images(masked, model.generate(ids(START), guidance_scale=1.0, **GREEDY))

    def test_padding_is_found_without_a_mask(self, model):
        prompt = pad_left([[5, 6, 7, START], [8, START]])
        with_mask = model.generate(**prompt, **GREEDY)
        assert same_images(with_mask, model.generate(prompt["input_ids"], **GREEDY))

    def test_pixels_equal_their_codes(self, model, pixel_values):
        row = ids(*PICTURE, 5, *PICTURE, START)
        encoded = model.vision_tokenizer.encode(pixel_values)
        codes = {"pixel_codes": encoded.pixel_codes, "semantic_codes": encoded.semantic_codes}
        from_pixels = model.generate(row, pixel_values=pixel_values, **GREEDY)
        assert same_images(from_pixels, model.generate(row, **codes, **GREEDY))
        swapped = {name: kind.flip(0) for name, kind in codes.items()}
        assert not same_images(from_pixels, model.generate(row, **swapped, **GREEDY))

    def test_several_per_prompt(self, model):
        """Rows with different numbers of images are repeated with their own images."""
        codes = random_codes(3)
        out = model.generate(**pad_left(ROWS), **codes, num_return_sequences=2, **GREEDY)
        once = model.generate(**pad_left(ROWS), **codes, **GREEDY)
        assert out.image_owner.tolist() == list(range(6)) and len(out.sequences) == 6
        assert torch.equal(out.pixel_codes, once.pixel_codes.repeat_interleave(2, 0))
        assert torch.equal(out.semantic_codes, once.semantic_codes.repeat_interleave(2, 0))
        assert torch.equal(out.sequences, once.sequences.repeat_interleave(2, 0))

    def test_a_number_of_numpys_is_one(self, model):
        """As `num_return_sequences`, of a configuration file's array for instance."""
        repeats = np.int64(2)
        assert same_images(
            model.generate(ids(5), num_return_sequences=repeats, **GREEDY),
            model.generate(ids(5), num_return_sequences=2, **GREEDY),
        )

    def test_seeds(self, model):
        def draw(seed, **kwargs):
            generator = torch.Generator().manual_seed(seed)
            return model.generate(ids(5, START), generation_mode="image", generator=generator, **kwargs)

        assert same_images(draw(1), draw(1))
        assert not same_images(draw(1), draw(2))
        several = draw(1, num_return_sequences=3)
        assert len(several.pixel_codes.flatten(1).unique(dim=0)) == 3
        torch.manual_seed(7)
        first = model.generate(ids(5, START), generation_mode="image")
        torch.manual_seed(7)
        assert same_images(first, model.generate(ids(5, START), generation_mode="image"))

    def test_one_generator_for_each(self, model):
        """An image depends on its own alone: in a batch, drawn again by itself, and from a longer or padded batch."""
        codes = random_codes(3)

        def generators(*seeds):
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        draw = functools.partial(model.generate, generation_mode="image", guidance_scale=2.0)
        batch = draw(**pad_left(ROWS), **codes, num_return_sequences=2, generator=generators(*range(6)))
        for index in range(6):
            row, images = ROWS[index // 2], take(codes, IMAGES_BEFORE[index // 2])
            alone = draw(ids(*row), **images, generator=generators(index))
            assert torch.equal(alone.pixel_codes[0], batch.pixel_codes[index])
            assert torch.equal(alone.semantic_codes[0], batch.semantic_codes[index])
            assert same_images(alone, draw(ids(*row), **images, generator=generators(index)[0]))
        assert len(batch.pixel_codes.flatten(1).unique(dim=0)) == 6

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    def test_generators_that_do_not_fit(self, model, mode):
        one = torch.Generator()
        for generators in ([one], [one, torch.Generator(), torch.Generator()], [one, one]):
            with pytest.raises(ValueError, match="`generator` must have one for every row, 2|must be different ones"):
                model.generate(ids(5), num_return_sequences=2, generation_mode=mode, generator=generators)

    @pytest.mark.parametrize("mode", ["image", "interleaved"])
    @pytest.mark.parametrize("part", ["language_model.layers.0.mlp", "depth_heads"])
    @pytest.mark.parametrize("do_sample", [True, False])
    def test_weights_of_nan_are_named(self, mode, part, do_sample):
        model = lively_unified_model()
        weight = next(p for name, p in model.named_parameters() if part in name and p.ndim > 1)
        with torch.no_grad():
            weight.fill_(math.nan)
        arguments = {"generation_mode": mode, "image_do_sample": do_sample, "max_new_tokens": N + 1}
        with pytest.raises(ValueError, match="The depth heads' scores hold NaN or infinity"):
            model.generate(ids(5, START), **arguments)
        if part != "depth_heads":
            for mode in ("text", "interleaved"):
                with pytest.raises(ValueError, match="No token was left to choose: the scores hold NaN"):
                    model.generate(ids(5, 6), generation_mode=mode, max_new_tokens=2, do_sample=do_sample)

    def test_max_new_tokens_is_ignored(self, model):
        short = model.generate(ids(5, START), max_new_tokens=2, **GREEDY)
        assert same_images(short, model.generate(ids(5, START), **GREEDY))

    def test_decoded(self, model):
        out = model.generate(**pad_left([[5], [6, 7]]), **GREEDY)
        images = model.decode_images(out)
        assert images.shape == (2, 3, 24, 24) and images.isfinite().all()
        assert torch.equal(images, model.decode_images(pixel_codes=out.pixel_codes))
        out.pixel_codes = out.pixel_codes[:0]
        assert model.decode_images(out).shape == (0, 3, 24, 24)


class TestNegativePrompt:
    PROMPTS = pad_left([[5, 6, 7, START], [8, START]])

    def generate(self, model, **kwargs):
        return model.generate(**self.PROMPTS, guidance_scale=2.5, **GREEDY, **kwargs)

    def test_default_is_image_start_alone(self, model):
        default = self.generate(model)
        assert same_images(default, self.generate(model, negative_prompt_ids=ids(START)))
        assert same_images(default, self.generate(model, negative_prompt_ids=ids(START).repeat(2, 1)))
        assert not same_images(default, self.generate(model, negative_prompt_ids=ids(9, START)))

    def test_one_for_all(self, model):
        one = self.generate(model, negative_prompt_ids=ids(9, 10, START))
        two = self.generate(model, negative_prompt_ids=ids(9, 10, START).repeat(2, 1))
        assert same_images(one, two)

    def test_one_per_row_left_padded(self, model):
        negative = pad_left([[9, 10, 11, START], [12, START]])
        out = self.generate(
            model,
            negative_prompt_ids=negative["input_ids"],
            negative_prompt_attention_mask=negative["attention_mask"],
        )
        assert_codes(
            out,
            *(
                torch.stack(kind)
                for kind in zip(
                    naive().image([5, 6, 7, START], negative=[9, 10, 11, START], guidance_scale=2.5),
                    naive().image([8, START], negative=[12, START], guidance_scale=2.5),
                )
            ),
        )
        assert same_images(out, self.generate(model, negative_prompt_ids=negative["input_ids"]))

    def test_repeated_with_the_prompts(self, model):
        negative = pad_left([[9, 10, 11, START], [12, START]])["input_ids"]
        once = self.generate(model, negative_prompt_ids=negative)
        twice = self.generate(model, negative_prompt_ids=negative, num_return_sequences=2)
        assert torch.equal(twice.pixel_codes, once.pixel_codes.repeat_interleave(2, 0))

    def test_its_images(self, model, pixel_values):
        encoded = model.vision_tokenizer.encode(pixel_values[:1])
        negative = {"negative_prompt_ids": ids(*PICTURE, START)}
        from_pixels = self.generate(model, **negative, negative_pixel_values=pixel_values[:1])
        from_codes = self.generate(
            model,
            **negative,
            negative_pixel_codes=encoded.pixel_codes,
            negative_semantic_codes=encoded.semantic_codes,
        )
        assert same_images(from_pixels, from_codes)
        assert not same_images(from_pixels, self.generate(model, **negative, negative_pixel_values=pixel_values[1:]))

    def test_in_interleaved_mode(self, model, pixel_values):
        negative = {
            "negative_prompt_ids": pad_left([[*PICTURE, 9, START], [START]])["input_ids"],
            "negative_pixel_values": pixel_values[:1],
        }
        arguments = {**self.PROMPTS, "guidance_scale": 2.5, **INTERLEAVED, "max_new_tokens": N + 1, **negative}
        assert same_images(model.generate(**arguments), self.generate(model, **negative))

    @pytest.mark.parametrize(
        "negative, message",
        [
            ({"negative_prompt_ids": ids(9, 10)}, "must end in `<image_start>`"),
            ({"negative_prompt_ids": torch.tensor([[START, START], [9, 10]])}, "must end in `<image_start>`"),
            ({"negative_prompt_ids": ids(9, START).repeat(3, 1)}, r"one row per prompt, got \(3, 2\) for 2 prompts"),
            ({"negative_prompt_ids": ids(9, START).repeat(4, 1)}, r"one row per prompt, got \(4, 2\) for 2 prompts"),
            ({"negative_prompt_ids": torch.zeros(1, 0, dtype=torch.long)}, "one row per prompt"),
            ({"negative_prompt_ids": ids(START)[0]}, "one row per prompt"),
            (
                {"negative_prompt_ids": ids(9, START), "negative_prompt_attention_mask": ids(1)},
                "`negative_prompt_attention_mask` must have the shape of the ids",
            ),
            (
                {"negative_prompt_ids": ids(9, START), "negative_prompt_attention_mask": ids(1, 0)},
                "padded on the left, but `negative_prompt_attention_mask`",
            ),
            ({"negative_prompt_attention_mask": ids(1)}, "negative_prompt_attention_mask need `negative_prompt_ids`"),
            ({"negative_pixel_values": torch.zeros(1, 3, 24, 24)}, "negative_pixel_values need"),
            ({"negative_prompt_ids": ids(*PICTURE, START)}, r"0 image\(s\) were given"),
        ],
    )
    @pytest.mark.parametrize("repeats", [1, 2])
    def test_bad(self, model, negative, message, repeats):
        with pytest.raises(ValueError, match=message):
            self.generate(model, **negative, num_return_sequences=repeats)
