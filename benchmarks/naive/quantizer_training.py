"""A residual quantiser's training forward as one would write it first: distance matrices and one-hot products."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ema_update import one_hot_statistics
from .residual_search import nearest_codes_by_distance_matrix


@dataclass
class NaiveCodebook:
    """One codebook for all depths: code vectors (K, C), their counts (K,) and sums (K, C), as in the package."""

    embeddings: Tensor
    cluster_size: Tensor
    embedding_sum: Tensor
    decay: float
    eps: float

    @torch.no_grad()
    def update(self, codes: Tensor, vectors: Tensor) -> None:
        """An EMA step with the `codes` (T,) of `vectors` (T, C); unused codes restart at random ones of them."""
        num_codes = len(self.embeddings)
        counts, sums = one_hot_statistics(codes, vectors, num_codes)
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embedding_sum.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        # Fewer vectors than codes: the batch tiled, plus noise.
        tiles = -(-num_codes // len(vectors))
        pool = vectors.repeat(tiles, 1)
        restart = pool[torch.randperm(len(pool))[:num_codes]]
        if tiles > 1:
            restart = restart + 0.01 / vectors.shape[1] ** 0.5 * torch.rand_like(restart)
        used = (self.cluster_size >= 1).float().unsqueeze(1)
        self.embedding_sum.mul_(used).add_(restart * (1 - used))
        self.cluster_size.mul_(used[:, 0]).add_(1 - used[:, 0])
        total = self.cluster_size.sum()
        smoothed = total * (self.cluster_size + self.eps) / (total + num_codes * self.eps)
        self.embeddings.copy_(self.embedding_sum / smoothed.unsqueeze(1))


def look_up(codes: Tensor, embeddings: Tensor, one_hot: bool) -> Tensor:
    """The vectors (T, C) of codes (T,): rows of the table, or a product with one-hot codes (T, K)."""
    if not one_hot:
        return embeddings[codes]
    return F.one_hot(codes, len(embeddings)).to(embeddings.dtype) @ embeddings


def naive_training_forward(
    codebook: NaiveCodebook, vectors: Tensor, num_depths: int, update_rule: str, one_hot_lookup: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (T, D), straight-through sums (T, C) and the commitment loss of `vectors` (T, C); moves the codebook."""
    residual, partial = vectors.detach(), torch.zeros_like(vectors)
    codes, looked_up, commitments = [], [], []
    for _ in range(num_depths):
        chosen = nearest_codes_by_distance_matrix(residual, codebook.embeddings)
        embeds = look_up(chosen, codebook.embeddings, one_hot_lookup)
        if update_rule == "rq":
            codebook.update(chosen, residual)
        codes.append(chosen)
        looked_up.append(residual)
        partial = partial + embeds
        residual = residual - embeds
        commitments.append(F.mse_loss(vectors, partial))
    if update_rule == "rq_ema":
        codebook.update(torch.cat(codes), torch.cat(looked_up))
    straight_through = vectors + (partial - vectors).detach()
    return torch.stack(codes, dim=-1), straight_through, torch.stack(commitments).mean()
