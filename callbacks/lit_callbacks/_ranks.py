"""Values over all ranks. Every rank must call these together; on one rank they change nothing."""

from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

T = TypeVar("T")


def largest(trainer: Trainer, values: Tensor) -> Tensor:
    """Elementwise maximum over ranks."""
    if trainer.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def mean(trainer: Trainer, values: Tensor) -> Tensor:
    """Elementwise mean over ranks."""
    if trainer.world_size > 1:
        dist.all_reduce(values)
        values = values / trainer.world_size
    return values


def gather(trainer: Trainer, item: T) -> list[T]:
    """Every rank's item, by rank: slow, for rare events only."""
    if trainer.world_size == 1:
        return [item]
    items: list[T] = [item] * trainer.world_size
    dist.all_gather_object(items, item)
    return items
