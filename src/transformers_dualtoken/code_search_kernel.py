"""The search for the nearest code as one Triton kernel, on GPUs of NVIDIA: no score is ever written to memory."""

import torch


# Without Triton the model's other files must still load from the Hub, which takes only this form for optional.
try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The search for codes as one kernel needs Triton: `pip install triton`.") from error


# A program's tile of scores. With the running maximum and its place every score takes three registers: twice the tile,
# or codes wider than 32, spill on compute capability 8.0.
MAX_WIDTH = 32
_BLOCK_VECTORS = 64
_BLOCK_CODES = 64
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 3}


# No size makes a binary of its own: what was tried once is what runs.
@triton.jit(do_not_specialize=["num_vectors", "num_codes", "codes_per_split"])
def nearest_codes_kernel(
    vectors,  # (T, C) float32
    codebook,  # (K, C) float32
    bias,  # (K,) float32: -|e|^2 / 2
    best_scores,  # (splits, T) float32
    best_codes,  # (splits, T) int64
    num_vectors,
    num_codes,
    codes_per_split,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    split = tl.program_id(1)
    column = tl.arange(0, PADDED_WIDTH)
    within = tl.arange(0, BLOCK_CODES)
    is_row, is_column = row < num_vectors, column < WIDTH
    part = tl.load(
        vectors + row[:, None] * WIDTH + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
    )

    first = split * codes_per_split
    last = tl.minimum(first + codes_per_split, num_codes)
    # Of every column of the tile its own maximum: columns are compared with one another once, at the end.
    best = tl.full((BLOCK_VECTORS, BLOCK_CODES), float("-inf"), tl.float32)
    best_start = tl.zeros((BLOCK_VECTORS, BLOCK_CODES), tl.int32) + first
    for start in range(first, last, BLOCK_CODES):
        code = start + within
        is_code = code < last
        keys = tl.load(
            codebook + code[None, :] * WIDTH + column[:, None], mask=is_code[None, :] & is_column[:, None], other=0.0
        )
        scores = tl.dot(part, keys, input_precision=PRECISION)
        scores += tl.load(bias + code, mask=is_code, other=float("-inf"))[None, :]
        better = scores > best
        best = tl.where(better, scores, best)
        best_start = tl.where(better, start, best_start)

    score = tl.max(best, 1)
    # Of equal scores the lowest code. NaN is above nothing, so a vector whose scores all are keeps the first.
    code = tl.min(tl.where(best == score[:, None], best_start + within[None, :], num_codes), 1)
    out = split.to(tl.int64) * num_vectors + row
    tl.store(best_scores + out, score, mask=is_row)
    tl.store(best_codes + out, code.to(tl.int64), mask=is_row)


def kernel_constants(width: int, precision: str) -> dict:
    """What the kernel is compiled for."""
    return {
        "WIDTH": width,
        "PADDED_WIDTH": max(16, triton.next_power_of_2(width)),  # the least that the matrix units take
        "BLOCK_VECTORS": _BLOCK_VECTORS,
        "BLOCK_CODES": _BLOCK_CODES,
        "PRECISION": precision,
    }


def fused_nearest_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, precision: str = "tf32x3", splits: int | None = None
) -> torch.Tensor:
    """
    Index `(T,)` of the nearest code of every vector: argmax_k (r . e_k - |e_k|^2 / 2), the lowest of equals.

    Args:
        vectors (`torch.Tensor` of shape `(T, C)`): float32, on a CUDA device of compute capability 8.0 or later.
        codebook (`torch.Tensor` of shape `(K, C)`): float32.
        precision (`str`): of the products. `"tf32x3"`: three of TF32, as exact as float32 to 2^-20 and on the matrix
            units; `"ieee"`: float32.
        splits (`int`, *optional*): into how many parts the codes are divided; by default as many as keep the GPU busy.
    """
    if vectors.shape[1] != codebook.shape[1] or vectors.device != codebook.device:
        raise ValueError(
            f"Vectors and codes must be of one width and on one device, got widths {vectors.shape[1]} and "
            f"{codebook.shape[1]} on {vectors.device} and {codebook.device}."
        )
    if not len(vectors):
        return torch.empty(0, dtype=torch.long, device=vectors.device)
    vectors, codebook = vectors.contiguous(), codebook.contiguous()
    (num_vectors, width), num_codes = vectors.shape, len(codebook)
    blocks = triton.cdiv(num_vectors, _BLOCK_VECTORS)
    most_splits = triton.cdiv(num_codes, _BLOCK_CODES)
    if splits is None:
        # Fewer vectors than make the GPU busy: the codes are divided too, as far as all programs run at once.
        properties = torch.cuda.get_device_properties(vectors.device)
        at_once = (3 if properties.major == 9 else 2) * properties.multi_processor_count
        splits = max(1, at_once // blocks)
    # Whole tiles, and no part without codes.
    codes_per_split = triton.cdiv(most_splits, min(splits, most_splits)) * _BLOCK_CODES
    splits = triton.cdiv(num_codes, codes_per_split)

    bias = codebook.square().sum(1).mul_(-0.5)
    scores = torch.empty(splits, num_vectors, dtype=torch.float32, device=vectors.device)
    codes = torch.empty(splits, num_vectors, dtype=torch.long, device=vectors.device)
    # Triton launches on the current device, whatever device its tensors are on.
    with torch.cuda.device_of(vectors):
        nearest_codes_kernel[(blocks, splits)](
            vectors,
            codebook,
            bias,
            scores,
            codes,
            num_vectors,
            num_codes,
            codes_per_split,
            **kernel_constants(width, precision),
            **LAUNCH_OPTIONS,
        )
    if splits == 1:
        return codes[0]
    return codes.gather(0, scores.argmax(0, keepdim=True))[0]
