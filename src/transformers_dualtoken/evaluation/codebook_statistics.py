"""How evenly a codebook is used: share of the codes, perplexity and entropy. Needs torch alone."""

import math

import torch

from ..field_rules import at_least
from .processes import summed


class CodebookUsage:
    """
    Counts how often every code occurs at every depth. The state is `counts`, int64 `(D, K)`; it moves to the device of
    the codes it is given, and `update` never waits for that device. A codebook shared by all depths is judged by the
    counts of all of them together.
    """

    def __init__(self, num_depths: int, codebook_size: int, shared_codebook: bool = True):
        at_least(1).check_given(num_depths=num_depths, codebook_size=codebook_size)
        self.num_depths, self.codebook_size, self.shared_codebook = num_depths, codebook_size, shared_codebook
        self.counts = torch.zeros(num_depths, codebook_size, dtype=torch.int64)

    def update(self, codes: torch.Tensor) -> None:
        """Count `codes`, int64 `(..., D)` in 0..K-1; others raise a `RuntimeError` (on a GPU later)."""
        if codes.shape[-1] != self.num_depths:
            raise ValueError(
                f"`codes` must have {self.num_depths} depths in the last dimension, got shape {tuple(codes.shape)}."
            )
        self.counts = self.counts.to(codes.device)
        by_depth = codes.detach().reshape(-1, self.num_depths).t()
        # Unlike bincount, this needs no look at the largest code, which would wait for the GPU.
        self.counts.scatter_add_(1, by_depth, torch.ones_like(by_depth))

    def compute(self) -> dict[str, float]:
        """
        `usage`: share of the K codes that occurred, in 0..1; `entropy`: of the codes, in bits, at most log2 K;
        `perplexity`: 2 to the entropy, at most K. Usage and entropy of codebooks of their own are means over the
        depths. All are NaN before the first update.
        """
        usage, entropy = self._judge(self.counts.sum(0, keepdim=True) if self.shared_codebook else self.counts)
        entropy = entropy.mean()
        return {"usage": float(usage.mean()), "perplexity": float(entropy.exp2()), "entropy": float(entropy)}

    def compute_per_depth(self) -> dict[str, list[float]]:
        """The numbers of `compute` for every depth alone: lists of D floats, the first depth first."""
        usage, entropy = self._judge(self.counts)
        return {"usage": usage.tolist(), "perplexity": entropy.exp2().tolist(), "entropy": entropy.tolist()}

    @staticmethod
    def _judge(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Usage and entropy in bits, `(N,)` each, of the counts `(N, K)`."""
        counts = counts.cpu().double()  # not every device has float64
        total = counts.sum(1)
        entropy = torch.special.entr(counts / total[:, None]).sum(1) / math.log(2)
        usage = (counts > 0).double().mean(1).where(total > 0, torch.nan)
        return usage, entropy

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()

    def reduce(self, device: torch.device | str | None = None) -> "CodebookUsage":
        """A new object with the counts of all processes, each of which must call it, brought to `device` to be sent."""
        total = CodebookUsage(self.num_depths, self.codebook_size, self.shared_codebook)
        total.counts = summed(self.counts.to(device))
        return total
