"""The EMA of a codebook as one would write it first: a product with one-hot codes."""

from torch import Tensor


def one_hot_statistics(codes: Tensor, vectors: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was chosen (K,), and the sums (K, C) of its `vectors` (T, C); one-hot codes are (K, T)."""
    one_hot = vectors.new_zeros(num_codes, len(codes)).scatter_(0, codes[None], 1)
    return one_hot.sum(dim=1), one_hot @ vectors


def one_hot_update(
    embeddings: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    codes: Tensor,
    vectors: Tensor,
    decay: float,
    eps: float,
) -> None:
    """Move the code vectors (K, C), their counts (K,) and sums (K, C) in place, without restarts."""
    num_codes = len(embeddings)
    counts, sums = one_hot_statistics(codes, vectors, num_codes)
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    embedding_sum.mul_(decay).add_(sums, alpha=1 - decay)
    total = cluster_size.sum()
    smoothed = total * (cluster_size + eps) / (total + num_codes * eps)
    embeddings.copy_(embedding_sum / smoothed.unsqueeze(1))
