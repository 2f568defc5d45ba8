"""Codes drawn from logits: their distribution, and the settings of both heads."""

import math
from dataclasses import fields, replace

import pytest
import torch
from generation_helpers import GREEDY, START, ids, same_images

from transformers_dualtoken.code_sampling import DualTokenCodeSampler


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


def test_every_setting_of_the_sampler_tells_one_captured_step_from_another():
    """A graph replays the settings it was captured with."""
    sampler = DualTokenCodeSampler()
    changed = {"temperature": (2.0, 1.0), "top_k": (5, 900), "top_p": (0.5, 0.96), "do_sample": False}
    assert changed.keys() == {field.name for field in fields(sampler)} - {"generator"}
    constants = {replace(sampler, **{name: value}).constants for name, value in changed.items()}
    assert len(constants | {sampler.constants}) == len(changed) + 1
    assert replace(sampler, generator=torch.Generator()).constants == sampler.constants
