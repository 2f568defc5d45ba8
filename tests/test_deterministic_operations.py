"""
Nothing of ours is what a GPU refuses under `torch.use_deterministic_algorithms` (Trainer's `--full_determinism`).

By the names of the operations, as its documentation lists them.
"""

import pytest
import torch
from generation_helpers import END, PICTURE, START, draw, ids, random_codes, shared_model
from tiny_models import lively_unified_model, tiny_tokenizer_config
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.code_sampling import DualTokenCodeSampler


# `interpolate` is not among them: on a GPU it takes another way by itself.
REFUSED = {"histc", "put", "put_", "median", "nll_loss2d_forward", "grid_sampler_2d_backward", "_ctc_loss"}
REFUSED |= {f"_adaptive_avg_pool{n}d_backward" for n in (2, 3)} | {f"reflection_pad{n}d_backward" for n in (1, 2, 3)}
REFUSED |= {f"adaptive_max_pool{n}d_backward" for n in (2, 3)} | {f"max_unpool{n}d" for n in (2, 3)}


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_float_sum = name in ("cumsum", "cumsum_") and args[0].dtype.is_floating_point
        is_weighted = name == "bincount" and any(x is not None for x in args[1:2])
        assert not (name in REFUSED or is_float_sum or is_weighted), f"{name} is refused on a GPU"
        return function(*args, **(kwargs or {}))


def test_the_check_finds_what_is_refused():
    with Refuses(), pytest.raises(AssertionError, match="cumsum is refused"):
        torch.ones(2).cumsum(0)
    with Refuses():
        torch.ones(2).long().cumsum(0)


def test_training_of_the_unified_model():
    model = lively_unified_model().train()
    row = ids(5, START, *PICTURE, END, 6)
    with Refuses():
        model(row, attention_mask=torch.ones_like(row), labels=row, **random_codes(1)).loss.backward()


def test_training_of_the_tokenizer():
    model = DualTokenVisionTokenizer(tiny_tokenizer_config()).train()
    size = model.config.image_size
    with Refuses():
        output = model(torch.rand(2, 3, size, size) * 2 - 1)
        (output.reconstruction.mean() + output.pixel_commitment_loss + output.semantic_commitment_loss).backward()


@pytest.mark.parametrize("settings", [{}, {"image_top_k": 0}, {"pixel_top_p": 0.5}])
def test_drawing(settings):
    model = shared_model()
    with Refuses():
        model.decode_images(draw(model, **settings))


@pytest.mark.parametrize("top_k, top_p", [((0, 0), (0.9, 0.9)), ((900, 300), (0.96, 0.5)), ((0, 5), (1.0, 0.7))])
def test_sums_in_whole_numbers_leave_the_same_codes(top_k, top_p):
    """Against sums in float64, code by code: with noise that lifts each in turn, whatever is left can be drawn."""
    num_codes, rows = 2048, 3
    logits = 3 * torch.randn(2, rows, num_codes, generator=torch.Generator().manual_seed(0))
    sampler = DualTokenCodeSampler(top_k=top_k, top_p=top_p)
    ranked = logits.sort(-1, descending=True)
    for head, (k, p) in enumerate(zip(top_k, top_p)):
        kept = k or num_codes
        probabilities = ranked.values[head, :, :kept].double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        for place in (0, 1, 2, 5, 17, 50, 100, 200, 299, 500, 899, 1500, 2047):
            noise = torch.zeros(2, rows, sampler.num_candidates(num_codes))
            if place >= noise.shape[-1]:
                continue
            noise[:, :, place] = 1e6
            is_drawn = sampler(logits, noise)[head] == ranked.indices[head, :, place]
            is_left = before[:, place] < p if place < kept else torch.zeros(rows, dtype=torch.bool)
            sure = (before[:, place] - p).abs() > 1e-6 if place < kept else torch.ones(rows, dtype=torch.bool)
            assert torch.equal(is_drawn[sure], (is_left | (p == 1) & (place < kept))[sure])
