"""Sums and lists over the processes of `torch.distributed`, which all must call these; alone, of this one."""

import torch
import torch.distributed as dist


def rank_and_number() -> tuple[int, int]:
    """This process's rank, and how many there are (on a CPU accelerate may say one where the group has several)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, a new one of the same shape."""
    total = tensor.clone()
    if rank_and_number()[1] > 1:
        dist.all_reduce(total)
    return total


def gathered(value) -> list:
    """What every process gave, by rank."""
    values = [value]
    if rank_and_number()[1] > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
