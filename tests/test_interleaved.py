"""Interleaved generation against the naive loop, single rows and the two other modes."""

import math

import pytest
import torch
from generation_helpers import (
    CACHES,
    END,
    EOS,
    GREEDY,
    IMAGE,
    IMAGES_BEFORE,
    INTERLEAVED,
    PAD,
    PICTURE,
    ROWS,
    START,
    VOCAB,
    N,
    Recorder,
    assert_codes,
    force,
    ids,
    naive,
    naive_force,
    pad_left,
    pairs,
    push,
    random_codes,
    same_images,
    shared_model,
    take,
)
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper


class TestInterleaved:
    @CACHES
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_rows_at_different_stages_equal_the_naive_loop(self, scale, cache):
        """An image at once, text first, an image in the prompt, two images; the free steps are the model's choice."""
        model, codes, budget = shared_model(), random_codes(2), 30
        rows = [[5, 6, 7, START], [8], [9, *PICTURE, 10], [*PICTURE, START]]
        images = [slice(0, 0), slice(0, 0), slice(0, 1), slice(1, 2)]
        plans = [{}, {2: START}, {4: START, 15: 13, 17: START}, {10: 14, 11: START}]
        prompt = pad_left(rows)
        length = prompt["input_ids"].shape[1]
        out = model.generate(
            **prompt,
            **codes,
            guidance_scale=scale,
            max_new_tokens=budget,
            eos_token_id=None,
            cache_implementation=cache,
            logits_processor=[force(plans, length)],
            **INTERLEAVED,
        )
        pixel, semantic, owners = [], [], []
        for index, (row, plan) in enumerate(zip(rows, plans)):
            new, new_images = naive().interleaved(
                row, pairs(take(codes, images[index])), budget, scale, scores_hook=naive_force(plan, len(row))
            )
            assert out.sequences[index, length:].tolist() == new
            pixel += [image[0] for image in new_images]
            semantic += [image[1] for image in new_images]
            owners += [index] * len(new_images)
        assert out.image_owner.tolist() == owners and len(owners) >= 6
        assert_codes(out, torch.stack(pixel), torch.stack(semantic))

    @CACHES
    @pytest.mark.parametrize("negative_rows", [1, 2])
    def test_negative_prompts_equal_the_naive_loop(self, negative_rows, cache):
        """Images that overlap in time, then a pause of both rows, then a new image."""
        model, negative_codes, budget = shared_model(), random_codes(1, seed=6), 36
        rows, plans = [[5, START], [8, 9]], [{10: 13, 17: START}, {3: START, 14: 7, 24: START}]
        negatives = [[9, *PICTURE, 10, START], [START]][:negative_rows]
        negative = pad_left(negatives)
        out = model.generate(
            **pad_left(rows),
            negative_prompt_ids=negative["input_ids"],
            negative_prompt_attention_mask=negative["attention_mask"],
            **{f"negative_{name}": kind for name, kind in negative_codes.items()},
            guidance_scale=2.5,
            max_new_tokens=budget,
            eos_token_id=None,
            cache_implementation=cache,
            logits_processor=[force(plans, 2)],
            **INTERLEAVED,
        )
        pixel, semantic = [], []
        for index, (row, plan) in enumerate(zip(rows, plans)):
            other = negatives[index % negative_rows]
            new, images = naive().interleaved(
                row,
                max_new_tokens=budget,
                guidance_scale=2.5,
                scores_hook=naive_force(plan, 2),
                negative=(other, pairs(negative_codes) if IMAGE in other else []),
            )
            assert out.sequences[index, 2:].tolist() == new
            pixel += [image[0] for image in images]
            semantic += [image[1] for image in images]
        assert len(pixel) >= 4
        assert_codes(out, torch.stack(pixel), torch.stack(semantic))

    def test_left_padded_batch_equals_single_rows(self):
        model, codes = shared_model(), random_codes(3)
        rows = [row + [START] if index == 1 else row for index, row in enumerate(ROWS)]
        prompt = pad_left(rows)
        length = prompt["input_ids"].shape[1]
        arguments = {"max_new_tokens": 16, "eos_token_id": None, **INTERLEAVED}
        plans = [{3: START}, {}, {1: START}]
        batch = model.generate(**prompt, **codes, logits_processor=[force(plans, length)], **arguments)
        for index, (row, images) in enumerate(zip(rows, IMAGES_BEFORE)):
            processor = force(plans[index : index + 1], len(row))
            alone = model.generate(ids(*row), **take(codes, images), logits_processor=[processor], **arguments)
            assert torch.equal(alone.sequences[0, len(row) :], batch.sequences[index, length:])
            assert torch.equal(alone.pixel_codes, batch.pixel_codes[batch.image_owner == index])
            assert torch.equal(alone.semantic_codes, batch.semantic_codes[batch.image_owner == index])

    def test_starting_in_an_image_equals_image_mode(self, model):
        prompt = pad_left([[5, 6, 7, START], [8, START]])
        image = model.generate(**prompt, guidance_scale=2.5, **GREEDY)
        both = model.generate(**prompt, guidance_scale=2.5, max_new_tokens=N + 1, **INTERLEAVED)
        assert same_images(image, both) and torch.equal(image.sequences, both.sequences)
        assert torch.equal(image.image_owner, both.image_owner)

    def test_text_alone_equals_text_mode(self, model):
        arguments = {"max_new_tokens": 8, "suppress_tokens": [START]}
        prompt = {**pad_left(ROWS), **random_codes(3)}
        both = model.generate(**prompt, **arguments, **INTERLEAVED)
        assert torch.equal(both.sequences, model.generate(**prompt, **arguments))
        assert both.pixel_codes.shape == both.semantic_codes.shape == (0, 3, 3, 3)
        assert both.image_owner.shape == (0,) and both.image_owner.dtype == torch.int64
        assert model.decode_images(both).shape == (0, 3, 24, 24)

    def test_no_image_is_started_that_cannot_finish(self, model):
        """The model wants nothing but images: two fit into 25 tokens, and three of the 25 are left for text."""
        out = model.generate(ids(5), max_new_tokens=25, logits_processor=[push(START)], **INTERLEAVED)
        new = out.sequences[0, 1:].tolist()
        assert new[:22] == PICTURE + PICTURE and len(new) == 25
        assert not set(new[22:]) & {START, IMAGE, END}
        exact = model.generate(ids(5), max_new_tokens=22, logits_processor=[push(START)], **INTERLEAVED)
        assert exact.sequences[0, 1:].tolist() == PICTURE + PICTURE
        short = model.generate(ids(5), max_new_tokens=N + 1, logits_processor=[push(START)], **INTERLEAVED)
        assert len(short.pixel_codes) == 0

    def test_default_budget(self, model):
        out = model.generate(ids(5), eos_token_id=None, suppress_tokens=[START], **INTERLEAVED)
        assert out.sequences.shape[1] == 1 + 2 * (N + 2) + 256  # two images and some text

    def test_max_length(self, model):
        by_length = model.generate(ids(5, 6), max_length=14, logits_processor=[push(START)], **INTERLEAVED)
        by_tokens = model.generate(ids(5, 6), max_new_tokens=12, logits_processor=[push(START)], **INTERLEAVED)
        assert torch.equal(by_length.sequences, by_tokens.sequences) and by_length.sequences.shape == (1, 14)

    def test_prompt_asks_for_an_image_beyond_the_budget(self, model):
        with pytest.raises(ValueError, match="takes 10 tokens, but `max_new_tokens` is 9"):
            model.generate(ids(5, START), max_new_tokens=N, **INTERLEAVED)

    @pytest.mark.parametrize(
        "config, keywords, own, length",
        [
            (None, {"max_length": 9}, {"max_new_tokens": 4}, 9),
            ({"max_length": 9}, {}, {"max_new_tokens": 4}, 9),
            ({"max_new_tokens": 4}, {"max_length": 9}, {"max_new_tokens": 3}, 9),
            ({"max_length": 9}, {"max_new_tokens": 4}, {}, 6),
            (None, {"max_length": 9, "max_new_tokens": 4}, {}, 6),
            ({"max_new_tokens": 4}, {"max_new_tokens": None}, {"max_length": 9}, 9),
            (None, {}, {"max_new_tokens": 4, "max_length": 9}, 6),
        ],
    )
    def test_lengths_count_by_where_they_stand(self, monkeypatch, model, config, keywords, own, length):
        monkeypatch.setattr(model, "generation_config", GenerationConfig(pad_token_id=PAD, **own))
        for given in (config, config and GenerationConfig(**config)):
            out = model.generate(ids(5, 6), given, suppress_tokens=[START, EOS], **keywords, **INTERLEAVED)
            assert out.sequences.shape == (1, length)

    @pytest.mark.parametrize("max_length", [20, 21])
    def test_a_value_equal_to_a_default_is_given(self, model, max_length):
        for arguments in ({"max_length": max_length}, {"generation_config": GenerationConfig(max_length=max_length)}):
            out = model.generate(ids(5, 6), eos_token_id=None, suppress_tokens=[START], **arguments, **INTERLEAVED)
            assert out.sequences.shape == (1, max_length)

    @pytest.mark.parametrize("warper", [{"top_p": 0.1}, {"top_k": 1}, {"min_p": 0.9}, {"temperature": 1e-9}])
    def test_image_tokens_are_barred_before_anything_is_left_out(self, model, warper):
        """The model wants image tokens only, and no image fits any more."""
        for mode in ({}, INTERLEAVED):
            wishes = [push(START, IMAGE, END)]
            arguments = {"max_new_tokens": N + 1, "do_sample": True, "eos_token_id": None, **warper, **mode}
            out = model.generate(ids(5), logits_processor=wishes, **arguments)
            assert not torch.isin(out.sequences if mode else out, torch.tensor([START, IMAGE, END])).any()
            # A caller's own warper, and one who insists.
            for processors in ([TopKLogitsWarper(1)], [force([{0: START, 1: IMAGE}], 1), TopPLogitsWarper(0.5)]):
                try:
                    out = model.generate(ids(5), logits_processor=processors, **arguments)
                except ValueError as error:
                    assert "No token was left to choose" in str(error)
                else:
                    assert not torch.isin(out.sequences if mode else out, torch.tensor([START, IMAGE, END])).any()

    @pytest.mark.parametrize(
        "everything",
        [
            {"suppress_tokens": list(range(VOCAB))},
            {"bad_words_ids": [[token] for token in range(VOCAB)], "eos_token_id": None},
            {"sequence_bias": [[[token], -math.inf] for token in range(VOCAB)]},
            {"suppress_tokens": [t for t in range(VOCAB) if t != EOS], "min_new_tokens": 3, "eos_token_id": EOS},
            {"logits_processor": [lambda input_ids, scores: scores.fill_(-math.inf)]},
            {"logits_processor": [lambda input_ids, scores: scores.fill_(math.nan)]},
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}])
    def test_everything_is_barred(self, model, everything, settings):
        modes = [{}] if "num_beams" in settings else [{}, INTERLEAVED]
        # transformers 5.6 biases no token 0.
        own = "No token was left to choose|list of lists of positive integers"
        for mode in modes:
            with pytest.raises(ValueError, match=own):
                model.generate(ids(5), max_new_tokens=5, **everything, **settings, **mode)

    def test_one_generator_for_each_row(self, model):
        """Text and images of a row depend on its own generator alone, also where the rows are at different stages."""

        def generators(*seeds):
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        plans = [{}, {2: START}, {5: START, 16: START}]
        arguments = {"generation_mode": "interleaved", "do_sample": True, "top_k": 0, "temperature": 30.0}
        arguments |= {"max_new_tokens": 30, "eos_token_id": None, "suppress_tokens": [START], "guidance_scale": 1.5}
        rows, codes = [[5, 6, START], [8], [*PICTURE, 9]], random_codes(1)
        for cache in ("static", "dynamic"):
            prompt = pad_left(rows)
            length = prompt["input_ids"].shape[1]
            batch = model.generate(
                **prompt,
                **codes,
                **arguments,
                cache_implementation=cache,
                generator=generators(0, 1, 2),
                logits_processor=[force(plans, length)],
            )
            assert len(batch.pixel_codes) >= 4
            for index, row in enumerate(rows):
                alone = model.generate(
                    ids(*row),
                    **take(codes, slice(0, int(index == 2))),
                    **arguments,
                    cache_implementation=cache,
                    generator=generators(index),
                    logits_processor=[force(plans[index : index + 1], len(row))],
                )
                assert torch.equal(alone.sequences[0, len(row) :], batch.sequences[index, length:])
                assert torch.equal(alone.pixel_codes, batch.pixel_codes[batch.image_owner == index])

    def test_free_placeholders_are_suppressed(self, model):
        out = model.generate(ids(5), max_new_tokens=8, logits_processor=[push(IMAGE, END)], **INTERLEAVED)
        assert not set(out.sequences[0].tolist()) & {IMAGE, END}

    def test_a_conversation_continued(self):
        """With the codes of all its images, cut after the first new image or in the text after it."""
        model, codes, row = shared_model(), random_codes(1), [5, *PICTURE, 6]
        plan = {2: START, 16: START}
        # No other starts: where the budget ends, they depend on it.
        arguments = {"eos_token_id": None, "suppress_tokens": [START], **INTERLEAVED}
        whole = model.generate(
            ids(*row), **codes, max_new_tokens=30, logits_processor=[force([plan], len(row))], **arguments
        )
        assert len(whole.pixel_codes) == 2
        for cut in (2 + N + 2, 2 + N + 4):
            first = model.generate(
                ids(*row), **codes, max_new_tokens=cut, logits_processor=[force([plan], len(row))], **arguments
            )
            seen = {name: torch.cat([codes[name], first[name]]) for name in codes}
            second = model.generate(
                first.sequences,
                **seen,
                max_new_tokens=30 - cut,
                logits_processor=[force([plan], len(row))],
                **arguments,
            )
            assert torch.equal(second.sequences, whole.sequences)
            assert torch.equal(torch.cat([first.pixel_codes, second.pixel_codes]), whole.pixel_codes)
            assert torch.equal(torch.cat([first.semantic_codes, second.semantic_codes]), whole.semantic_codes)

    def test_end_of_sequence(self, model):
        rows, plans = [[5], [6, 7]], [{1: EOS}, {0: START, 11: EOS}]
        out = model.generate(**pad_left(rows), max_new_tokens=30, logits_processor=[force(plans, 2)], **INTERLEAVED)
        # The first row waits, padded; the second ends after its image, and with it everything.
        assert out.sequences[0, 3:].tolist() == [EOS] + [PAD] * 10
        assert out.sequences[1, 2:].tolist() == [*PICTURE, EOS]
        assert out.image_owner.tolist() == [1]

    def test_several_ends_of_sequence(self, model):
        out = model.generate(
            ids(5),
            max_new_tokens=9,
            eos_token_id=[EOS, 30],
            logits_processor=[force([{0: 7, 1: 30}], 1)],
            **INTERLEAVED,
        )
        assert out.sequences.shape == (1, 3) and out.sequences[0, -1] == 30

    def test_several_per_prompt_and_seeds(self, model):
        def draw(seed, **kwargs):
            return model.generate(
                **pad_left(ROWS),
                **random_codes(3),
                generation_mode="interleaved",
                do_sample=True,
                max_new_tokens=14,
                num_return_sequences=2,
                eos_token_id=None,
                logits_processor=[force([{1: START}] * 6, max(map(len, ROWS)))],
                generator=torch.Generator().manual_seed(seed),
            )

        one, again, other = draw(1), draw(1), draw(2)
        assert one.image_owner.tolist() == list(range(6))
        assert same_images(one, again) and torch.equal(one.sequences, again.sequences)
        assert not same_images(one, other) and not torch.equal(one.sequences, other.sequences)
        assert not torch.equal(one.pixel_codes[0], one.pixel_codes[1])

    def test_guidance_of_a_generation_config_leaves_text_alone(self, model):
        arguments = {"max_new_tokens": 8, "suppress_tokens": [START]}
        plain = model.generate(ids(5, 6), **arguments, **INTERLEAVED)
        config = GenerationConfig(guidance_scale=5.0, **arguments)
        assert torch.equal(
            model.generate(ids(5, 6), generation_config=config, **INTERLEAVED).sequences, plain.sequences
        )

    def test_streamer(self, model):
        streamer = Recorder()
        out = model.generate(
            ids(5, 6), max_new_tokens=14, streamer=streamer, logits_processor=[force([{1: START}], 2)], **INTERLEAVED
        )
        new = out.sequences[0, 2:].tolist()
        assert streamer.values[0] == [5, 6] and streamer.ended == 1
        # Text and the start of the image; its placeholders are no text.
        assert sum(streamer.values[1:], []) == [token for token in new if token not in (IMAGE, END)]
        with pytest.raises(ValueError, match="A streamer takes one row"):
            model.generate(ids(5, 6).repeat(2, 1), streamer=Recorder(), **INTERLEAVED)

    def test_unconditional_rows_run_during_images_only(self, model, forward_rows):
        model.generate(
            ids(5), max_new_tokens=15, logits_processor=[force([{2: START}], 1)], eos_token_id=None, **INTERLEAVED
        )
        # The prompt's only token, once to see what layers there are; two tokens, <image_start> and the positions,
        # <image_end>, the rest.
        assert forward_rows == [1] + [1, 1, 1] + [2] * (1 + N) + [1] * 2
