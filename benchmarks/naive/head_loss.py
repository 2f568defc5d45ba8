"""The head loss as one would write it first: all logits of all groups at once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def materialised_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """
    Cross-entropy summed per group, shape (G,), float32.

    `hidden` (G, T, W), `weight` (G, V, W), `targets` (G, T), `bias` (G, V); the logits are (G, T, V). From bfloat16
    they become float32 before the softmax, as in transformers' losses.
    """
    logits = torch.einsum("gtw,gvw->gtv", hidden, weight)
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.unflatten(0, targets.shape).sum(dim=1)
