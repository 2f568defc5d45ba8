"""Cross-entropy of a linear classifier, summed, without ever holding all of its logits.

The depth heads classify every image position 2 x 8 times over 16384 codes: 0.76 GB of float32 logits per image, twice
that with their gradient. Here the logits exist one chunk of rows at a time. A group's sum is a scalar, so the chain rule
can only multiply its gradient by one number: it is computed in the forward, and the backward multiplies. Nothing is
approximated, and nothing is computed twice. Letters: G groups, T rows, W width, V classes.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .field_rules import at_least


# A chunk's float32 logits: 512 rows of 16384 classes. As fast as all rows at once, and small beside the gradients.
_CHUNK_BYTES = 32 * 2**20
# Each chunk reads and writes the whole weight gradient, which only enough rows pay for: 50000 classes in chunks of 55 rows
# are a quarter slower than in chunks of 256, and 512 are no faster (float32, one CPU thread).
_MIN_CHUNK_ROWS = 256
# Rows of the weight gradient made at once where it must pass through another dtype.
_WEIGHT_BLOCK_ROWS = 4096


class LinearCrossEntropyOutput(NamedTuple):
    """Both `(G,)`, and scalars without a group dimension in the inputs."""

    # Sum over the T rows of -log softmax(logits)[target], in nats; float32, or float64 for float64 inputs.
    loss_sums: Tensor
    # How many rows have their largest logit at the target, int64; where logits tie, the one that `torch.max` returns counts.
    num_correct: Tensor


# A compiled graph may copy a whole gradient for each chunk added to it in place; this breaks the graph instead.
@torch.compiler.disable
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk_size: int | None = None
) -> LinearCrossEntropyOutput:
    r"""
    Sum, per group, of the cross-entropy of `hidden @ weight.T + bias` against `targets`, in chunks of rows.

    The groups are separate classifiers (the depths of a head). For a single one (text) leave the group dimension out of
    every argument. Rows without a target must be taken out beforehand: there is no ignore index.

    Args:
        hidden (`Tensor` of shape (G, T, W) or (T, W)): inputs of the classifiers; strided views are fine, T may be 0.
        weight (`Tensor` of shape (G, V, W) or (V, W)): the classifiers, of the dtype of `hidden` unless autocast is on.
        targets (`Tensor` of shape (G, T) or (T,), int64): classes in [0, V). The range is checked on the CPU only; on a
            device, where that would be a host sync, a wrong class trips the device's own index assertion.
        bias (`Tensor` of shape (G, V) or (V,), *optional*): added to the logits.
        chunk_size (`int`, *optional*): rows of logits held at once; by default those whose float32 logits take 32 MiB,
            at least 256, evened out over the chunks.

    Returns:
        `LinearCrossEntropyOutput`. Its `loss_sums` is differentiable once; with a gradient to compute, the forward
        already costs forward and backward together. Memory beyond inputs and results is one chunk of logits, and one
        buffer per gradient, which the backward hands over as the gradient itself (a copy under `retain_graph=True`).

    Matrix products run in the dtype of `hidden`, or in autocast's; everything between logits and loss in float32
    (float64 for float64 inputs). With bfloat16 products the weight gradient of a chunk is rounded once to bfloat16, and
    the chunks are added in float32, in a scratch copy of one group's weight. In float16 the probabilities would
    underflow, as no loss scale has reached them yet, so that its products run in float32.
    """
    single = hidden.dim() == 2 and weight.dim() == 2
    if single:
        hidden, weight, targets = hidden.unsqueeze(0), weight.unsqueeze(0), targets.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    matmul_dtype = _matmul_dtype(hidden, weight)
    _check(hidden, weight, targets, bias, chunk_size, single)
    chunk_size = chunk_size or _default_chunk_size(hidden.shape[1], weight.shape[1])
    arguments = (hidden, weight, targets, bias, chunk_size, matmul_dtype)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        loss_sums, num_correct = _LinearCrossEntropy.apply(*arguments)
    else:
        loss_sums, num_correct, _ = _walk(*arguments, needs_grad=(False, False, False))
    if single:
        loss_sums, num_correct = loss_sums.squeeze(0), num_correct.squeeze(0)
    return LinearCrossEntropyOutput(loss_sums=loss_sums, num_correct=num_correct)


class _LinearCrossEntropy(torch.autograd.Function):
    """(G, T, W), (G, V, W), (G, T) and (G, V) or None -> both (G,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, chunk_size, matmul_dtype):
        needs_grad = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        loss_sums, num_correct, grads = _walk(
            hidden, weight, targets, bias, chunk_size, matmul_dtype, needs_grad=needs_grad
        )
        # Not as plain attributes: autograd drops saved tensors before it stores what the backward returned, and would
        # copy a buffer that `ctx` still held.
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(num_correct)
        return loss_sums, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss_sums, _):
        in_place = not _graph_is_kept()
        hidden, weight, bias = (
            None if grad is None else _scale_groups(grad, grad_loss_sums, dtype, in_place)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return hidden, weight, None, bias, None, None


def _walk(hidden, weight, targets, bias, chunk_size, matmul_dtype, needs_grad):
    """
    Over groups and chunks of rows: (G,) loss sums, (G,) correct rows, and the gradients of the sums in hidden, weight and
    bias, or None where `needs_grad` says so.
    """
    num_groups, num_rows, _ = hidden.shape
    num_classes, width = weight.shape[1:]
    device = hidden.device
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    needs_hidden, needs_weight, needs_bias = needs_grad

    loss_sums = torch.zeros(num_groups, dtype=dtype, device=device)
    num_correct = torch.zeros(num_groups, dtype=torch.int64, device=device)
    # Empty where the first chunk overwrites it.
    new_buffer = torch.empty if num_rows else torch.zeros
    grads = [
        new_buffer(x.shape, dtype=_buffer_dtype(x.dtype), device=device) if needed else None
        for x, needed in zip((hidden, weight, bias), needs_grad)
    ]
    grad_hidden, grad_weight, grad_bias = grads
    if num_rows == 0:
        return loss_sums, num_correct, grads

    chunk_rows = min(chunk_size, num_rows)
    all_logits = torch.empty(chunk_rows, num_classes, dtype=dtype, device=device)
    one_dtype = matmul_dtype == dtype
    all_raw = all_logits if one_dtype else torch.empty(chunk_rows, num_classes, dtype=matmul_dtype, device=device)
    weight_sum = bias_sum = None
    if needs_weight and grad_weight.dtype != dtype and chunk_rows < num_rows:
        weight_sum = torch.empty(num_classes, width, dtype=dtype, device=device)
    if needs_bias:
        bias_sum = torch.empty(num_classes, dtype=dtype, device=device)

    # The casts below are explicit, and autocast does not accept `out=`.
    with torch.no_grad(), without_autocast(device.type):
        for group in range(num_groups):
            group_weight = weight[group].to(matmul_dtype)
            group_bias = None if bias is None else bias[group].to(dtype)
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, min(start + chunk_rows, num_rows))
                size = rows.stop - rows.start
                first = start == 0
                chunk = hidden[group, rows].to(matmul_dtype)
                target = targets[group, rows].unsqueeze(1)

                logits, raw = all_logits[:size], all_raw[:size]
                torch.mm(chunk, group_weight.t(), out=raw)
                if not one_dtype:
                    logits.copy_(raw)
                if group_bias is not None:
                    logits.add_(group_bias)
                top, top_class = logits.max(dim=1, keepdim=True)
                num_correct[group] += (top_class == target).sum()
                target_logit = logits.sub_(top).gather(1, target)
                total = logits.exp_().sum(dim=1, keepdim=True)
                loss_sums[group] += (total.log() - target_logit).sum()
                if not any(needs_grad):
                    continue

                # softmax - onehot, the gradient of the loss in the logits
                grad_logits = logits.div_(total)
                grad_logits.scatter_add_(1, target, torch.full_like(total, -1))
                if needs_bias:
                    torch.sum(grad_logits, dim=0, out=bias_sum) if first else bias_sum.add_(grad_logits.sum(dim=0))
                if not one_dtype:
                    grad_logits = raw.copy_(grad_logits)
                if needs_hidden and grad_hidden.dtype == matmul_dtype:
                    torch.mm(grad_logits, group_weight, out=grad_hidden[group, rows])
                elif needs_hidden:
                    grad_hidden[group, rows] = grad_logits @ group_weight
                if needs_weight:
                    _add_weight_grad(
                        grad_weight[group] if weight_sum is None else weight_sum, grad_logits, chunk, first
                    )
            if weight_sum is not None:
                grad_weight[group] = weight_sum
            if needs_bias:
                grad_bias[group] = bias_sum
    return loss_sums, num_correct, grads


def _add_weight_grad(out: Tensor, grad_logits: Tensor, chunk: Tensor, first: bool):
    """`out` (V, W) += `grad_logits` (t, V) transposed @ `chunk` (t, W); the first chunk overwrites `out`."""
    if out.dtype == chunk.dtype:
        out.addmm_(grad_logits.t(), chunk, beta=0 if first else 1)
        return
    for block, block_grad in zip(out.split(_WEIGHT_BLOCK_ROWS), grad_logits.split(_WEIGHT_BLOCK_ROWS, dim=1)):
        product = block_grad.t() @ chunk
        block.copy_(product) if first else block.add_(product)


def _scale_groups(grad: Tensor, scales: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Multiply each group of `grad` (G, ...) by its own number of `scales` (G,); returns it in `dtype`."""
    scaled = grad if in_place else torch.empty_like(grad)
    for out, group, scale in zip(scaled, grad, scales):
        if group.dtype == scale.dtype:
            torch.mul(group, scale, out=out)
        else:  # not straight away: a scalar is rounded to the dtype of the tensor that it multiplies
            out.copy_(group.to(scale.dtype).mul_(scale))
    return scaled.to(dtype)


def _graph_is_kept() -> bool:
    """Whether the running backward may be run again (`retain_graph`), so that the saved buffers must stay intact."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


def _buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient before it is scaled: its tensor's, but float16 would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast chooses the dtype of matrix products on such a device."""
    # Devices without autocast (meta) raise on the second question.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """A context manager within which products keep the dtype they are given."""
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext()


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    dtype, device_type = hidden.dtype, hidden.device.type
    # As autocast's own matrix products do, leave float64 alone.
    if is_autocast_on(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"`hidden` and `weight` must have one dtype outside autocast, got {hidden.dtype} and {weight.dtype}. "
            "Cast one of them, or run under `torch.autocast`."
        )
    return _buffer_dtype(dtype)


def _default_chunk_size(num_rows: int, num_classes: int) -> int:
    rows = max(_CHUNK_BYTES // (4 * num_classes), _MIN_CHUNK_ROWS)
    return math.ceil(num_rows / math.ceil(num_rows / rows)) if num_rows else 1


def _check(hidden, weight, targets, bias, chunk_size, single):
    """Check grouped inputs; `single` says that the caller left the group dimension out, for the messages."""
    if hidden.dim() != 3 or weight.dim() != 3:
        raise ValueError(
            "`hidden` and `weight` must have the shapes (G, T, W) and (G, V, W), or (T, W) and (V, W) for one group, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    (groups, rows, width), (classifiers, classes, expected) = hidden.shape, weight.shape
    if not hidden.is_floating_point():
        raise TypeError(f"`hidden` must have a floating-point dtype, got {hidden.dtype}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"`targets` must be classes of dtype torch.int64, got {targets.dtype}.")
    at_least(1).check_given(chunk_size=chunk_size)
    if classifiers != groups:
        raise ValueError(
            f"`hidden` has {groups} groups and `weight` has {classifiers}: every group needs a classifier."
        )
    if expected != width:
        raise ValueError(f"`hidden` has the width {width}, but `weight` expects the width {expected}.")
    for name, tensor, shape in (("targets", targets, (groups, rows)), ("bias", bias, (groups, classes))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"`{name}` must have the shape {shape[single:]}, got {tuple(tensor.shape)[single:]}.")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"`targets` must lie in [0, {classes}), the classes of `weight`, got values from {low} to {high}. Rows "
                "without a target (-100) must be taken out of `hidden` and `targets` beforehand."
            )
