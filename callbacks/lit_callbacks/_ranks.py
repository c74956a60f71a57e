"""Values over all ranks. Every rank must call these together; on one rank they change nothing."""

import zlib
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

T = TypeVar("T")


class Measurement(NamedTuple):
    """One rank's part of a measurement: floating-point tensors by name, to be added up and to be maximised."""

    sums: Mapping[str, Tensor] = {}
    maxima: Mapping[str, Tensor] = {}


def tensor_parallel(trainer: Trainer) -> tuple[int, int]:
    """This rank's place among those that share the work of one batch, and how many they are: 0 of 1 elsewhere."""
    parts = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    size = trainer.world_size // parts
    return trainer.global_rank % size, size


def side_by_side(trainer: Trainer, rows: Tensor, nothing: float = 0.0) -> Tensor:
    """Rows of heads or hidden units, at this rank's place among those that have others, for a reduction over ranks.

    Args:
        trainer: The trainer.
        rows: ``(n, ...)``.
        nothing: What changes nothing in the reduction.

    Returns:
        ``(n * ranks of a tensor-parallel group, ...)``; without one, the rows themselves.
    """
    place, ranks = tensor_parallel(trainer)
    if ranks == 1:
        return rows
    whole = rows.new_full((ranks, *rows.shape), nothing)
    whole[place] = rows
    return whole.flatten(0, 1)


def largest(trainer: Trainer, values: Tensor) -> Tensor:
    """Elementwise maximum over ranks."""
    if trainer.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def rows_of_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Every rank's vector as a row, by rank, in one small collective."""
    rows = torch.zeros(trainer.world_size, len(values), device=values.device, dtype=values.dtype)
    rows[trainer.global_rank] = values
    if trainer.world_size > 1:
        dist.all_reduce(rows)
    return rows


def gather(trainer: Trainer, item: T) -> list[T]:
    """Every rank's item, by rank: slow, for rare events only."""
    if trainer.world_size == 1:
        return [item]
    items: list[T] = [item] * trainer.world_size
    dist.all_gather_object(items, item)
    return items


def any_failed(trainer: Trainer, failed: bool, measurement: Measurement) -> tuple[bool, bool]:
    """Whether any rank failed, and whether the ranks measured different things, in one small collective."""
    if trainer.world_size == 1:
        return failed, False
    # 20 bits, which fp32 holds exactly; a rank's key is the same as every other's if the largest is the smallest.
    key = zlib.crc32(repr(_shapes(measurement)).encode()) % 2**20
    flags = torch.tensor([float(failed), key, -key], device=trainer.strategy.root_device, dtype=torch.float32)
    any_rank, highest, negated_lowest = largest(trainer, flags).tolist()
    return bool(any_rank), highest != -negated_lowest


def combine(trainer: Trainer, measurement: Measurement, differ: bool) -> Measurement:
    """The measurement over all ranks; what a rank did not see, because its batch took another way, counts as nothing.

    Args:
        trainer: The trainer.
        measurement: This rank's part.
        differ: Whether the ranks' names or shapes differ, as :func:`any_failed` says.
    """
    if trainer.world_size == 1:
        return measurement
    names: dict[str, dict[str, list[int]]] = _shapes(measurement)
    if differ:
        for other in gather(trainer, names):
            for kind, shapes in other.items():
                names[kind] = shapes | names[kind]
        names = {kind: dict(sorted(shapes.items())) for kind, shapes in names.items()}
    device = trainer.strategy.root_device
    return Measurement(
        _reduce(names["sums"], measurement.sums, 0.0, dist.ReduceOp.SUM, device),
        _reduce(names["maxima"], measurement.maxima, -torch.inf, dist.ReduceOp.MAX, device),
    )


def _shapes(measurement: Measurement) -> dict[str, dict[str, list[int]]]:
    return {
        kind: {name: list(tensor.shape) for name, tensor in getattr(measurement, kind).items()}
        for kind in ("sums", "maxima")
    }


def _reduce(
    names: Mapping[str, list[int]],
    values: Mapping[str, Tensor],
    nothing: float,
    operation: object,
    device: torch.device,
) -> dict[str, Tensor]:
    if not names:
        return {}
    parts = [
        values[name].to(device, torch.float32) if name in values else torch.full(shape, nothing, device=device)
        for name, shape in names.items()
    ]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, op=operation)
    split = flat.split([part.numel() for part in parts])
    return {name: piece.view(part.shape) for name, piece, part in zip(names, split, parts, strict=True)}
