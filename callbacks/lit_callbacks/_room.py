"""Where do snapshots fit: in memory, on disk, or nowhere?"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_callbacks import _ranks
from lit_callbacks._snapshots import disk_room, host_room

_SHARE = 0.5  # of what is free: the loader's workers and the page cache want some as well
_FEWEST = 2  # with one, there is nothing to go back to while it is being taken


class Room(NamedTuple):
    """How many snapshots are kept, what makes room for one, and a sentence about it."""

    keep: int
    allocate: Callable[[int], Tensor]
    statement: str
    is_less: bool
    """Whether it is less than was asked for."""


def find_room(trainer: Trainer, size: int, keep: int, folder: Path) -> Room:
    """Where ``keep`` snapshots of ``size`` bytes fit, on every rank; fewer, or on disk, or none where they do not."""
    ranks_here = max(1, trainer.num_devices)
    in_memory = _fit(available_memory(), size * ranks_here)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    on_disk = _fit(shutil.disk_usage(existing).free, size * ranks_here)
    fewest = -_ranks.largest(trainer, -torch.tensor([in_memory, on_disk], device=trainer.strategy.root_device))
    in_memory, on_disk = int(fewest[0]), int(fewest[1])
    each = f"a snapshot takes {size / 2**20:,.0f} MiB"
    pinned = trainer.strategy.root_device.type == "cuda"
    if in_memory >= keep:
        return Room(keep, host_room(pinned), f"{each} of host memory, {keep} are kept", False)
    if in_memory >= _FEWEST:
        statement = f"{each} of host memory, so only {in_memory} instead of {keep} are kept"
        return Room(in_memory, host_room(pinned), statement, True)
    if on_disk >= _FEWEST:
        statement = f"{each}, for which host memory has no room: {_FEWEST} are kept on disk, in {folder}"
        return Room(_FEWEST, disk_room(folder), statement, True)
    statement = f"{each}, for which neither memory nor disk has room: steps are skipped, but nothing is rolled back"
    return Room(0, host_room(pinned), statement, True)


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping, or None where the system does not say (other than Linux)."""
    try:
        free = 1024 * _number(Path("/proc/meminfo"), "MemAvailable:")
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")  # a container's limit; where there is none it is written "max"
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text()) - _number(group / "memory.stat", "inactive_file")
        free = min(free, limit - used)
    return max(0, free)


def _number(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


def _fit(free: int | None, size: int) -> int:
    return 10**6 if free is None else int(free * _SHARE // max(1, size))
