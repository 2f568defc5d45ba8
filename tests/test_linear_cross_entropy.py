"""`linear_cross_entropy` against the materialised reference, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_dualtoken.linear_cross_entropy import _default_chunk_size, linear_cross_entropy


GROUPS, ROWS, WIDTH, CLASSES = 3, 11, 8, 13
LOSS_SCALES = (0.25, -3.0, 7.5)  # the gradient of each group's loss sum


def reference(hidden, weight, targets, bias=None):
    """All logits at once: loss sums (G,) and numbers of correct rows (G,)."""
    logits = torch.einsum("gtw,gvw->gtv", hidden, weight).float()
    if bias is not None:
        logits = logits + bias.float().unsqueeze(1)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.unflatten(0, targets.shape).sum(dim=1), (logits.argmax(dim=-1) == targets).sum(dim=1)


def inputs(rows=ROWS, dtype=torch.float32, with_bias=True, requires_grad=True):
    """hidden (G, T, W), weight (G, V, W), targets (G, T), bias (G, V) or None."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad)

    hidden, weight = normal(GROUPS, rows, WIDTH), normal(GROUPS, CLASSES, WIDTH)
    targets = torch.randint(CLASSES, (GROUPS, rows), generator=generator)
    return hidden, weight, targets, normal(GROUPS, CLASSES) if with_bias else None


def gradients(loss_sums, *tensors, **kwargs):
    loss = (loss_sums * torch.tensor(LOSS_SCALES, dtype=loss_sums.dtype)).sum()
    return torch.autograd.grad(loss, [x for x in tensors if x is not None], **kwargs)


class RecordedSizes(TorchDispatchMode):
    """Records the number of elements of every storage made under it; `inputs` are there already."""

    def __init__(self, *inputs):
        super().__init__()
        self.numels, self._seen = [], [x.untyped_storage() for x in inputs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if all(storage.data_ptr() != seen.data_ptr() for seen in self._seen):
                    self._seen.append(storage)  # kept, so that no address comes back
                    self.numels.append(storage.nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4, 11, 100])
def test_equals_reference(chunk_size, with_bias):
    hidden, weight, targets, bias = inputs(with_bias=with_bias)
    out = linear_cross_entropy(hidden, weight, targets, bias, chunk_size=chunk_size)
    expected_sums, expected_correct = reference(hidden, weight, targets, bias)

    assert out.loss_sums.shape == (GROUPS,) and out.loss_sums.dtype == torch.float32
    assert not out.num_correct.requires_grad
    torch.testing.assert_close(out.loss_sums, expected_sums)
    assert torch.equal(out.num_correct, expected_correct)
    for ours, expected in zip(
        gradients(out.loss_sums, hidden, weight, bias), gradients(expected_sums, hidden, weight, bias)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_required_gradient(needed):
    named = dict(zip(("hidden", "weight", "targets", "bias"), inputs(requires_grad=False)))
    named[needed].requires_grad_()
    expected = gradients(reference(**named)[0], named[needed])
    gradients_of_ours = gradients(linear_cross_entropy(**named, chunk_size=4).loss_sums, named[needed])
    torch.testing.assert_close(gradients_of_ours, expected, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_large_logits():
    hidden, weight, targets, _ = inputs(with_bias=False, requires_grad=False)
    # As a head has them: positions before depths. Logits of about 1e4 overflow a softmax that does not shift.
    hidden = (hidden.transpose(0, 1).contiguous() * 1e3).requires_grad_()
    ours = linear_cross_entropy(hidden.transpose(0, 1), weight, targets, chunk_size=4).loss_sums
    expected, _ = reference(hidden.transpose(0, 1), weight, targets)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, hidden), gradients(expected, hidden), rtol=1e-5, atol=1e-5)


def test_without_the_group_dimension():
    hidden, weight, targets, bias = (x.detach()[0] for x in inputs())
    out = linear_cross_entropy(hidden, weight, targets, bias, chunk_size=4)
    logits = hidden @ weight.T + bias
    assert out.loss_sums.shape == out.num_correct.shape == ()
    torch.testing.assert_close(out.loss_sums, F.cross_entropy(logits, targets, reduction="sum"))
    assert out.num_correct == (logits.argmax(dim=-1) == targets).sum()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, bias).loss_sums.backward()
    assert weight.grad.shape == weight.shape


def test_num_correct_by_hand():
    weight = torch.eye(3)
    hidden = torch.tensor([[5.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 9.0], [1.0, 2.0, 3.0]])
    targets = torch.tensor([0, 2, 2, 2])
    assert linear_cross_entropy(hidden, weight, targets, chunk_size=3).num_correct == 3
    # Class 1 is lifted above all others but the 9 of the third row.
    lifted = linear_cross_entropy(hidden, weight, targets, torch.tensor([0.0, 6.0, 0.0]), chunk_size=3)
    assert lifted.num_correct == 1


def test_gradcheck():
    hidden, weight, targets, bias = inputs(rows=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(x[0], x[1], targets, x[2], chunk_size=2).loss_sums, (hidden, weight, bias)
    )


def test_no_rows():
    hidden, weight, targets, bias = inputs(rows=0)
    out = linear_cross_entropy(hidden, weight, targets, bias)
    assert out.loss_sums.tolist() == [0.0] * GROUPS and out.num_correct.tolist() == [0] * GROUPS
    for grad, tensor in zip(gradients(out.loss_sums, hidden, weight, bias), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, chunk_size):
    hidden, weight, targets, bias = inputs(dtype=dtype)
    out = linear_cross_entropy(hidden, weight, targets, bias, chunk_size=chunk_size)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    expected_sums, _ = reference(exact[0], exact[1], targets, exact[2])
    assert out.loss_sums.dtype == torch.float32
    torch.testing.assert_close(out.loss_sums, expected_sums, rtol=1e-2, atol=1e-2)
    for ours, expected in zip(gradients(out.loss_sums, hidden, weight, bias), gradients(expected_sums, *exact)):
        assert ours.dtype == dtype
        assert (ours.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(hidden_dtype):
    hidden, weight, targets, bias = inputs()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, bias, chunk_size=4).loss_sums
        expected, _ = reference(hidden, weight, targets, bias)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    for tensor, grad, other in zip(
        (hidden, weight, bias), gradients(ours, hidden, weight, bias), gradients(expected, hidden, weight, bias)
    ):
        assert grad.dtype == tensor.dtype
        assert (grad.float() - other.float()).norm() < 1e-2 * other.float().norm()


def test_memory_is_one_chunk_of_logits_and_one_buffer_per_gradient():
    rows, width, classes, chunk_size = 60, 40, 50, 10
    weight = torch.randn(2, classes, width)
    hidden, targets = torch.randn(2, rows, width), torch.randint(classes, (2, rows))
    chunk, weight_size, hidden_size = chunk_size * classes, weight.numel(), hidden.numel()

    for context, requires_grad in ((torch.no_grad(), True), (torch.enable_grad(), False)):
        weight.requires_grad_(requires_grad), hidden.requires_grad_(requires_grad)
        with context, RecordedSizes(hidden, weight, targets) as sizes:
            linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
        assert max(sizes.numels) == chunk

    weight.requires_grad_(), hidden.requires_grad_()
    with RecordedSizes(hidden, weight, targets) as sizes:
        linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size).loss_sums.sum().backward()
    assert sorted(size for size in sizes.numels if size >= chunk) == sorted([chunk, weight_size, hidden_size])

    weight.requires_grad_(False)
    with RecordedSizes(hidden, weight, targets) as sizes:
        linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size).loss_sums.sum().backward()
    assert weight_size not in sizes.numels


def test_backward_twice():
    hidden, weight, targets, _ = inputs(with_bias=False)
    loss_sums = linear_cross_entropy(hidden, weight, targets, chunk_size=4).loss_sums
    once = gradients(loss_sums, hidden, weight, retain_graph=True)
    again = gradients(loss_sums, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss_sums, hidden, weight)


def test_double_backward_raises():
    hidden, weight, targets, _ = inputs(with_bias=False)
    loss_sums = linear_cross_entropy(hidden, weight, targets).loss_sums
    (grad,) = torch.autograd.grad(loss_sums.pow(2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_default_chunk_size():
    assert _default_chunk_size(1458, 16384) == 486  # 512 rows are 32 MiB; three equal chunks
    assert _default_chunk_size(2000, 151936) == 250  # a text vocabulary: at most 256 rows
    assert _default_chunk_size(5, 16384) == 5
    assert _default_chunk_size(0, 16384) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, r"must have the shapes .* got \(3,\)"),
        ({"hidden": torch.zeros(4, 5)}, ValueError, r"must have the shapes .* got \(4, 5\) and \(2, 6, 5\)"),
        ({"weight": torch.zeros(3, 6, 5)}, ValueError, "2 groups and `weight` has 3"),
        ({"weight": torch.zeros(2, 6, 7)}, ValueError, "the width 5, but `weight` expects the width 7"),
        ({"weight": torch.zeros(2, 6, 5).double()}, TypeError, "one dtype"),
        ({"hidden": torch.zeros(2, 4, 5).long(), "weight": torch.zeros(2, 6, 5).long()}, TypeError, "floating-point"),
        ({"targets": torch.zeros(2, 3).long()}, ValueError, r"must have the shape \(2, 4\)"),
        ({"targets": torch.zeros(2, 4).int()}, TypeError, "torch.int64"),
        ({"targets": torch.full((2, 4), 6)}, ValueError, r"must lie in \[0, 6\)"),
        ({"targets": torch.full((2, 4), -100)}, ValueError, "taken out"),
        ({"bias": torch.zeros(6)}, ValueError, r"must have the shape \(2, 6\)"),
        ({"chunk_size": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "hidden": torch.zeros(2, 4, 5), "weight": torch.zeros(2, 6, 5), "targets": torch.zeros(2, 4).long()
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})
