"""Residual quantisation with EMA codebooks.

A residual quantiser describes a vector z by D codes: r_1 = z, k_d = argmin_k |r_d - e_k|^2, r_{d+1} = r_d - e_{k_d}.
The sum of the D code vectors is the quantised vector. Codebooks are not trained by gradient: they follow exponential
moving averages (EMA) of the vectors their codes were given to. (Weights of fewer bits are "low-bit", never this.)
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput
from transformers.utils.generic import maybe_autocast

from .code_search import nearest_codes
from .configuration_dualtoken import DualTokenQuantizerConfig


def _restart_vectors(pool: torch.Tensor, num_codes: int) -> torch.Tensor:
    """`(num_codes, C)` of the batch's vectors `(T, C)`, without replacement; the same on every rank (rank 0 chooses)."""
    num_vectors, width = pool.shape
    # Fewer vectors than codes: the batch is tiled.
    tiles = -(-num_codes // num_vectors)
    chosen = pool[torch.randperm(tiles * num_vectors, device=pool.device)[:num_codes] % num_vectors]
    if tiles > 1:
        # Copies of one vector must not become copies of one code.
        chosen.add_(torch.rand_like(chosen), alpha=0.01 / width**0.5)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(chosen, 0)
    return chosen


class DualTokenCodebook(nn.Module):
    """
    Code vectors and their EMA statistics in float32, whatever the model's dtype. Buffers rather than parameters, so
    that no optimizer moves them and ZeRO-3 never partitions them.

    - `embeddings` `(books, K, C)`: the code vectors; `books` is 1 (shared by all depths) or D.
    - `cluster_size` `(books, K)`: N, the moving average of how often a code was chosen.
    - `embedding_sum` `(books, K, C)`: M, the moving average of the sum of the vectors it was chosen for.
    """

    def __init__(self, config: DualTokenQuantizerConfig):
        super().__init__()
        self.decay, self.eps = config.ema_decay, config.ema_eps
        self.restart_unused_codes = config.restart_unused_codes
        shape = (1 if config.shared_codebook else config.num_depths, config.codebook_size, config.code_dim)
        for name, size in (("embeddings", shape), ("cluster_size", shape[:2]), ("embedding_sum", shape)):
            # `.float()` after the constructor: DeepSpeed's `zero.Init` casts what the constructors return.
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32).float())

    def _apply(self, fn, recurse=True):
        """Follow `.to(device)` but not `.to(dtype)`, `.half()` or `.bfloat16()`: an EMA needs its float32."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != torch.float32:
                self._buffers[name] = exact[name].to(device=buffer.device, dtype=torch.float32)
        return self

    def __getitem__(self, depth: int) -> torch.Tensor:
        """The code vectors of a depth, `(K, C)`."""
        return self.embeddings[depth if len(self.embeddings) > 1 else 0]

    @torch.no_grad()
    def update(self, depth: int, codes: torch.Tensor, vectors: torch.Tensor) -> None:
        """
        Move the codebook of a depth by one EMA step.

        N <- decay N + (1 - decay) n, M <- decay M + (1 - decay) sum(x); codes with N < 1 restart at a random vector
        of the batch (N = 1); e = M / [sum(N) (N + eps) / (sum(N) + K eps)]. The statistics are summed over the ranks.
        A step with a vector that is not finite, on any rank, changes nothing: a NaN would reach every code by the total
        of M, and stay.

        Args:
            depth (`int`): which codebook; ignored by a shared one.
            codes (`torch.Tensor` of shape `(T,)`): the chosen codes.
            vectors (`torch.Tensor` of shape `(T, C)`): the vectors they were chosen for; also the restart pool.
        """
        book = depth if len(self.embeddings) > 1 else 0
        embeddings, cluster_size, embedding_sum = (
            self.embeddings[book],
            self.cluster_size[book],
            self.embedding_sum[book],
        )
        vectors = vectors.float()
        # Not `bincount`, a host sync to learn the largest code; sums of ones are exact in float32.
        counts = torch.zeros_like(cluster_size).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(embedding_sum).index_add_(0, codes, vectors)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # Without a host sync, and alike on all ranks, since a NaN is summed over them. An average of equal numbers is
        # that number, bit for bit.
        is_finite = sums.isfinite().all()
        counts, sums = counts.where(is_finite, cluster_size), sums.where(is_finite, embedding_sum)
        cluster_size.lerp_(counts, 1 - self.decay)
        embedding_sum.lerp_(sums, 1 - self.decay)
        if self.restart_unused_codes:
            unused = (cluster_size < 1) & is_finite
            # Drawn for every code, used or not: the number of unused ones would be a host sync.
            restart = _restart_vectors(vectors, len(embeddings))
            torch.where(unused[:, None], restart, embedding_sum, out=embedding_sum)
            cluster_size.masked_fill_(unused, 1)
        total = cluster_size.sum()
        smoothed = total * (cluster_size + self.eps) / (total + len(embeddings) * self.eps)
        torch.where(is_finite, embedding_sum / smoothed[:, None], embeddings, out=embeddings)


@dataclass
class DualTokenQuantizerOutput(ModelOutput):
    codes: torch.LongTensor | None = None  # (..., D)
    quantized: torch.Tensor | None = None  # sum of the D code vectors, (..., C); its gradient is the input's
    # Mean over the depths of the mean squared error between the input and the running sum of code vectors; scalar.
    commitment_loss: torch.Tensor | None = None


# By update rule: whether the codebook moves after every depth, or once, after all of them.
_MOVES_WITHIN = {"rq": True, "rq_ema": False}


class DualTokenResidualQuantizer(nn.Module):
    """
    D residual codes per vector. In training mode the forward also moves the codebook, by `config.update_rule`: `"rq"`
    after every depth, and the next depth searches the moved one; `"rq_ema"` once, after all depths were looked up. Not
    where `frozen` is true: stage 2 of the paper's training holds the pixel codebook and its EMA still.
    """

    def __init__(self, config: DualTokenQuantizerConfig):
        super().__init__()
        self.config = config
        self.codebook = DualTokenCodebook(config)
        # Of a run, not of the model: not saved.
        self.frozen = False

    def forward(self, hidden_states: torch.Tensor) -> DualTokenQuantizerOutput:
        """Quantise vectors `(..., C)` of any float dtype; in float32, under autocast too."""
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return self._quantize(hidden_states)

    def _quantize(self, hidden_states: torch.Tensor) -> DualTokenQuantizerOutput:
        """`(..., C)`, as T vectors: residuals and sums are `(T, C)`, the codes of a depth `(T,)`."""
        shape = hidden_states.shape
        vectors = hidden_states.float().reshape(-1, shape[-1])
        residual = vectors.detach()
        running_sum = torch.zeros_like(residual)
        moves = self.training and not self.frozen
        moves_within = moves and _MOVES_WITHIN[self.config.update_rule]
        codes, residuals, commitment = [], [], 0.0
        for depth in range(self.config.num_depths):
            chosen = nearest_codes(residual, self.codebook[depth])
            embeds = F.embedding(chosen, self.codebook[depth])
            if moves_within:
                # After the lookup: this depth's vectors are those of the codebook it searched.
                self.codebook.update(depth, chosen, residual)
            codes.append(chosen)
            residuals.append(residual)
            running_sum = running_sum + embeds
            residual = residual - embeds
            commitment = commitment + F.mse_loss(vectors, running_sum)
        if moves and not moves_within:
            if self.config.ema_vectors == "final":
                residuals = [residual] * len(codes)
            if self.config.shared_codebook:
                self.codebook.update(0, torch.cat(codes), torch.cat(residuals))
            else:
                for depth, (chosen, residual) in enumerate(zip(codes, residuals)):
                    self.codebook.update(depth, chosen, residual)
        quantized = vectors + (running_sum - vectors).detach()
        return DualTokenQuantizerOutput(
            codes=torch.stack(codes, dim=-1).view(*shape[:-1], -1),
            quantized=quantized.view(shape).to(hidden_states.dtype),
            commitment_loss=commitment / self.config.num_depths,
        )

    def embed_codes_with_depth(self, codes: torch.Tensor) -> torch.Tensor:
        """The code vectors `(..., D, C)` of codes `(..., D)`, in float32."""
        embeddings = self.codebook.embeddings
        # Codes may be stored in narrow integers, which do not index (uint8 would be taken for a mask).
        codes = codes.long()
        if len(embeddings) == 1:
            return F.embedding(codes, embeddings[0])
        return embeddings[torch.arange(len(embeddings), device=codes.device), codes]

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The quantised vectors `(..., C)` of codes `(..., D)`: sums over the depths, in float32."""
        return self.embed_codes_with_depth(codes).sum(-2)

    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        """
        Raise a `ValueError` unless `codes` `(..., D)` are integers in range. The range is one host sync, left out under
        `torch.compile`.
        """
        num_depths, codebook_size = self.config.num_depths, self.config.codebook_size
        if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
            raise ValueError(f"`{name}` must be integers, got {codes.dtype}.")
        if codes.ndim == 0 or codes.shape[-1] != num_depths:
            raise ValueError(
                f"`{name}` must hold {num_depths} residual codes on the last axis, got shape {tuple(codes.shape)}."
            )
        if torch.compiler.is_compiling() or not codes.numel():
            return
        low, high = torch.stack(codes.aminmax()).tolist()
        if not 0 <= low <= high < codebook_size:
            raise ValueError(f"`{name}` must lie between 0 and {codebook_size - 1}, got values from {low} to {high}.")
