"""Weights that are split over ranks, by DeepSpeed's ZeRO-3 or by FSDP2, and brought together where a module is called."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from .optional_libraries import require


if dist.is_available():
    from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter is split over ranks, so that all of them must call the same modules in the same order."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return any(isinstance(parameter, DTensor) or _is_partitioned(parameter) for parameter in module.parameters())


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Of ZeRO-3, which leaves an empty tensor where a parameter is not in use."""
    return hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape


def any_rank(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on some rank. Every rank must ask."""
    flag = torch.tensor(int(condition), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gathered(parameters: Iterable[torch.Tensor], written: bool = False) -> AbstractContextManager:
    """
    Context in which parameters are whole under ZeRO-3 too; every rank must enter it. With `written` all ranks get
    afterwards what rank 0 wrote to them.
    """
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    # Of code from the Hub, every import outside of a `try` counts as a requirement.
    deepspeed = require("deepspeed", "Gathering weights that ZeRO-3 has split")
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """
    `target.load_state_dict(source.state_dict())`, under ZeRO-3 too, where state dicts hold empty tensors. A `ValueError`
    if the two have other weights, or weights of other shapes.
    """
    sources, targets = (module.state_dict(keep_vars=True) for module in (source, target))
    different = sorted(sources.keys() ^ targets.keys())
    if different:
        raise ValueError(f"The weights to copy do not fit the model: {', '.join(different[:5])} are in one only.")
    for name, value in sources.items():
        # One at a time: only one is whole on every rank.
        with gathered([value, targets[name]], written=True):
            if value.shape != targets[name].shape:
                raise ValueError(
                    f"The weight {name} to copy has the shape {tuple(value.shape)}, the model's has the shape "
                    f"{tuple(targets[name].shape)}."
                )
            targets[name].copy_(value)
