"""Liger's kernel in the place of the chunked loss: when it is called, with what, and that the results are the same."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from transformers_dualtoken import linear_cross_entropy as module
from transformers_dualtoken.linear_cross_entropy import linear_cross_entropy


class StandIn:
    """Liger's function by its keywords, in plain PyTorch; `calls` holds what it was given beside tensors."""

    def __init__(self):
        self.calls = []

    def __call__(self, hidden, weight, target, bias=None, **kwargs):
        self.calls.append(kwargs)
        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(logits, target, reduction=kwargs["reduction"])
        return type("Output", (), {"loss": loss, "predicted_tokens": logits.argmax(-1)})


@pytest.fixture
def stand_in(monkeypatch):
    function = StandIn()
    monkeypatch.setattr(module, "_liger_function", lambda device_type: function)
    return function


def make_inputs(dtype=torch.float32, rows=37, groups=()):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*groups, rows, 48, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(*groups, 129, 48, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(129, (*groups, rows), generator=generator)
    # Some right answers.
    targets[..., :9] = (hidden @ weight.transpose(-1, -2)).argmax(-1)[..., :9]
    return hidden, weight, targets


def results(hidden, weight, targets, **kwargs):
    hidden.grad = weight.grad = None
    output = linear_cross_entropy(hidden, weight, targets, **kwargs)
    (output.loss_sums * 0.37).sum().backward()
    return output.loss_sums, output.num_correct, hidden.grad, weight.grad


@pytest.mark.parametrize("groups", [(), (1,)])
def test_same_results_and_shapes_with_liger(stand_in, groups):
    inputs = make_inputs(groups=groups)
    with_liger = results(*inputs)
    assert len(stand_in.calls) == 1
    ours = results(*inputs, chunk_size=16)
    assert len(stand_in.calls) == 1
    for a, b in zip(with_liger, ours):
        torch.testing.assert_close(a, b)


def test_liger_sums_in_float32_and_in_large_chunks(stand_in):
    results(*make_inputs(torch.bfloat16))
    (call,) = stand_in.calls
    assert call["reduction"] == "sum" and call["accum_dtype"] == torch.float32
    # All 37 rows at once: 129 / (C * 48) <= 1.
    assert call["chunk_mem_const"] == 3


@pytest.mark.parametrize("case", ["groups", "no rows", "float64", "float16", "autocast", "weight alone"])
def test_liger_is_left_out_where_it_would_be_wrong_or_slow(stand_in, case):
    dtype = {"float64": torch.float64, "float16": torch.float16}.get(case, torch.float32)
    hidden, weight, targets = make_inputs(
        dtype, rows=0 if case == "no rows" else 37, groups=(2,) if case == "groups" else ()
    )
    if case == "weight alone":
        hidden = hidden.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        linear_cross_entropy(hidden, weight, targets).loss_sums.sum().backward()
    assert not stand_in.calls
    assert weight.grad is not None


def test_liger_serves_a_frozen_head_and_evaluation(stand_in):
    hidden, weight, targets = make_inputs()
    linear_cross_entropy(hidden, weight.detach(), targets).loss_sums.backward()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert len(stand_in.calls) == 2


def test_liger_is_asked_for_and_for_gpus(monkeypatch):
    monkeypatch.delenv("DUALTOKEN_LIGER", raising=False)
    module._liger_function.cache_clear()
    assert module._liger_function("cuda") is None
    monkeypatch.setenv("DUALTOKEN_LIGER", "1")
    module._liger_function.cache_clear()
    assert module._liger_function("cpu") is None
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-dualtoken\[kernels\]'"):
        module._liger_function("cuda")
    module._liger_function.cache_clear()


def test_the_kernel_itself(monkeypatch):
    """In Triton's interpreter; only where liger-kernel is installed and TRITON_INTERPRET=1 is set."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    monkeypatch.setattr(module, "_liger_function", lambda device_type: functional.liger_fused_linear_cross_entropy)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs = make_inputs(dtype)
        with_liger = results(*inputs)
        for a, b in zip(with_liger, results(*inputs, chunk_size=16)):
            assert (a - b).abs().max() <= tolerance * b.abs().max()
