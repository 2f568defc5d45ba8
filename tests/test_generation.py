"""Text, image and interleaved generation against the full forward, the naive loop and single rows."""

import copy
import functools
import math

import pytest
import torch
import transformers
from naive.generation_loop import NaiveGenerator, code_pairs
from tiny_models import depth_logits, lively_unified_model, tiny_unified_config
from transformers import DynamicCache, GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from transformers_dualtoken.code_sampling import DualTokenCodeSampler


N, START, IMAGE, END, PAD, EOS, VOCAB = 9, 50, 51, 52, 0, 2, 60
PICTURE = [START, *[IMAGE] * N, END]
CACHES = pytest.mark.parametrize("cache", ["static", "dynamic"])
GREEDY = {"generation_mode": "image", "image_do_sample": False}
GREEDY_IMAGES = dict.fromkeys(("image", "interleaved"), {"image_do_sample": False})
INTERLEAVED = {"generation_mode": "interleaved", "image_do_sample": False}


@functools.cache
def shared_model():
    return lively_unified_model()


@functools.cache
def naive():
    return NaiveGenerator(shared_model())


@pytest.fixture
def model():
    return shared_model()


def ids(*row: int) -> torch.Tensor:
    return torch.tensor([row])


def pad_left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def random_codes(images: int, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}_codes": torch.randint(24, (images, 3, 3, 3), generator=generator) for kind in ("pixel", "semantic")
    }


def pairs(codes: dict) -> list:
    return code_pairs(codes["pixel_codes"], codes["semantic_codes"]) if codes else []


def take(codes: dict, images: slice) -> dict:
    """The codes of some of the images; no codes at all for none."""
    part = {name: kind[images] for name, kind in codes.items()}
    return part if len(part["pixel_codes"]) else {}


def assert_codes(output, pixel, semantic):
    """`pixel`, `semantic`: `(images, N, D)` or, for one image, `(N, D)`."""
    assert torch.equal(output.pixel_codes.flatten(1, 2), pixel.view(-1, N, 3))
    assert torch.equal(output.semantic_codes.flatten(1, 2), semantic.view(-1, N, 3))


def same_images(one, other) -> bool:
    return torch.equal(one.pixel_codes, other.pixel_codes) and torch.equal(one.semantic_codes, other.semantic_codes)


# Prompts with no, one and two images, of different lengths.
ROWS = [[5, 6, 7], [8, *PICTURE, 9], [*PICTURE, 10, *PICTURE]]
IMAGES_BEFORE = [slice(0, 0), slice(0, 1), slice(1, 3)]


def force(plans: list[dict[int, int]], prompt_length: int):
    """A logits processor: row r must write `plans[r][step]` at that step, wherever it is given."""

    def process(input_ids, scores):
        step = input_ids.shape[1] - prompt_length
        for row, plan in enumerate(plans):
            if step in plan:
                scores[row] = -100.0
                scores[row, plan[step]] = 100.0
        return scores

    return process


def naive_force(plan: dict[int, int], prompt_length: int):
    def process(sequence, scores):
        return force([plan], prompt_length)(torch.tensor([sequence]), scores[None].clone())[0]

    return process


def push(*tokens: int):
    """A logits processor that makes tokens as likely as can be."""

    def process(input_ids, scores):
        scores[:, list(tokens)] += 1e4
        return scores

    return process


@pytest.fixture
def forward_rows(model):
    """Rows of every forward of the language model while the test runs."""
    rows = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    yield rows
    hook.remove()


@pytest.fixture
def positions(model):
    """Position ids of every forward of the language model while the test runs."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


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


class TestSampler:
    DRAWS = 20_000

    @staticmethod
    def logits(codes=24, seed=0):
        return 2 * torch.randn(2, codes, generator=torch.Generator().manual_seed(seed))

    @classmethod
    def frequencies(cls, logits, **settings):
        sampler = DualTokenCodeSampler(**settings, generator=torch.Generator().manual_seed(1))
        drawn = sampler(logits[:, None].expand(-1, cls.DRAWS, -1))
        assert drawn.shape == (2, cls.DRAWS) and drawn.dtype == torch.int64
        return [torch.bincount(kind, minlength=logits.shape[1]) for kind in drawn]

    @staticmethod
    def reference(logits, temperature, top_k, top_p):
        """Softmax; the k largest; of these, in falling order, those that less than p lies before; renormalised."""
        probabilities = torch.softmax(logits.double() / temperature, dim=-1)
        order = probabilities.argsort(descending=True)
        kept = order[: top_k or len(order)]
        weights = probabilities[kept] / probabilities[kept].sum()
        result, mass = torch.zeros_like(probabilities), 0.0
        for code, weight in zip(kept, weights):
            if mass < top_p:
                result[code] = weight
            mass += float(weight)
        return result / result.sum()

    @pytest.mark.parametrize(
        "temperature, top_k, top_p",
        [
            ((1.0, 1.0), (0, 0), (1.0, 1.0)),
            ((0.7, 1.8), (0, 0), (1.0, 1.0)),
            ((1.0, 1.0), (5, 12), (1.0, 1.0)),
            ((1.0, 1.0), (0, 8), (1.0, 1.0)),
            ((1.0, 1.0), (0, 0), (0.5, 0.9)),
            ((1.0, 2.0), (900, 900), (0.96, 1.0)),
            ((1.5, 1.2), (10, 6), (0.8, 0.7)),
        ],
    )
    def test_distribution(self, temperature, top_k, top_p):
        logits = self.logits()
        counts = self.frequencies(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        for kind in range(2):
            expected = self.DRAWS * self.reference(logits[kind], temperature[kind], top_k[kind], top_p[kind])
            possible = expected > 0
            assert counts[kind][~possible].sum() == 0
            # Codes expected fewer than five times are too rare for the approximation.
            common = expected >= 5
            chi_square = float(((counts[kind] - expected)[common] ** 2 / expected[common]).sum())
            freedom = int(common.sum()) - 1
            assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4

    @pytest.mark.parametrize(
        "settings", [{"top_k": (1, 1)}, {"top_p": (1e-6, 1e-6)}, {"temperature": (1e-4, 1e-4)}, {"do_sample": False}]
    )
    def test_greedy_in_four_ways(self, settings):
        logits = self.logits()
        counts = self.frequencies(logits, **settings)
        assert [int(kind.argmax()) for kind in counts] == logits.argmax(-1).tolist()
        assert [int(kind.max()) for kind in counts] == [self.DRAWS] * 2

    def test_bfloat16_logits(self):
        counts = self.frequencies(self.logits().to(torch.bfloat16), top_p=(1.0, 1.0))
        assert all(int((kind > 0).sum()) > 12 for kind in counts)

    @pytest.mark.parametrize(
        "settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=["top_k", "top_p", "temperature"]
    )
    def test_in_generate(self, model, settings):
        """Both heads at their most probable code equal greedy; one head alone changes that head only."""
        prompt = ids(5, 6, START)
        greedy = model.generate(prompt, **GREEDY)
        ((name, value),) = settings.items()
        both = model.generate(prompt, generation_mode="image", **{f"image_{name}": value})
        assert same_images(both, greedy)
        by_head = {f"pixel_{name}": value, f"semantic_{name}": value}
        assert same_images(model.generate(prompt, generation_mode="image", **by_head), greedy)
        # At the first position nothing has been drawn before that could make the heads depend on each other.
        first = {}
        for kind in ("pixel", "semantic"):
            out = model.generate(
                prompt,
                generation_mode="image",
                generator=torch.Generator().manual_seed(0),
                num_return_sequences=8,
                image_temperature=3.0,
                **{f"{kind}_{name}": value},
            )
            first[kind] = {other: out[f"{other}_codes"][:, 0, 0] for other in ("pixel", "semantic")}
        for kind, other in (("pixel", "semantic"), ("semantic", "pixel")):
            assert torch.equal(first[kind][kind], greedy[f"{kind}_codes"][:, 0, 0].expand(8, -1))
            assert len(first[kind][other].unique(dim=0)) > 1

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"image_temperature": 0.0}, "`image_temperature` must be a finite number above 0, got 0.0"),
            ({"pixel_temperature": -1.0}, "`pixel_temperature` must be a finite number above 0"),
            ({"image_top_k": -1}, "`image_top_k` must be a whole number from 0"),
            ({"image_top_k": math.nan}, "`image_top_k` must be a whole number from 0 .*, got nan"),
            ({"semantic_top_k": 1.5}, "`semantic_top_k` must be a whole number from 0"),
            ({"image_top_p": 0.0}, "`image_top_p` must be a number above 0 and up to 1"),
            ({"pixel_top_p": 1.1}, "`pixel_top_p` must be a number above 0 and up to 1"),
            ({"pixel_top_p": math.nan}, "`pixel_top_p` must be a number above 0 and up to 1"),
            ({"image_temperature": math.nan}, "`image_temperature` must be a finite number above 0"),
        ],
    )
    def test_out_of_range(self, model, settings, message):
        with pytest.raises(ValueError, match=message):
            model.generate(ids(5, START), generation_mode="image", **settings)


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


class Recorder:
    """What a `TextStreamer` is given."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


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
