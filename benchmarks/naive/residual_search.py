"""The residual search as one would write it first: the whole distance matrix at every depth."""

import torch
from torch import Tensor


def nearest_codes_by_distance_matrix(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index (T,) of the nearest of the codes (K, C) for `vectors` (T, C); the distances are (T, K)."""
    squares = vectors.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    distances = torch.addmm(squares, vectors, codebook.t(), alpha=-2)
    return distances.argmin(dim=1)


def nearest_codes_by_score_matrix(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The same without the vectors' own squares, which change no comparison: one matrix (T, K) instead of two."""
    return torch.addmm(codebook.square().sum(dim=1), vectors, codebook.t(), alpha=-2).argmin(dim=1)
