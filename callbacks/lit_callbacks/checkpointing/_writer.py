"""One checkpoint written by all ranks, or by none."""

import contextlib
import dataclasses
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.async_plugin import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from lit_callbacks import _ranks
from lit_callbacks._loop_state import begin_epoch, rerun_validation
from lit_callbacks._redaction import redacted
from lit_callbacks.checkpointing._durable import unfinished
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.atomic_checkpoint_io import AtomicCheckpointIO, remove
from lit_callbacks.checkpointing.background_checkpoint_io import BackgroundCheckpointIO
from lit_callbacks.checkpointing.manifest import Manifest, contents, manifest_path, verify

_SETTINGS = {"hyper_parameters", "datamodule_hyper_parameters", "config"}

Place = Literal["between_steps", "validation", "epoch_start"]
"""Where training stands: between two steps, in front of or inside a validation, in front of an epoch's first batch."""


class NotSavedError(Exception):
    """A checkpoint could not be written. The same on all ranks."""


def write(trainer: Trainer, path: Path, manifest: Manifest, size: int, place: Place) -> None:
    """Write a checkpoint and commit it. All ranks together.

    Like ``trainer.save_checkpoint``, in which an error on one rank leaves the others waiting at a barrier.

    Args:
        trainer: The trainer.
        path: Where, on a local disk.
        manifest: What to commit it by; its files are filled in.
        size: Bytes that the file will have, roughly.
        place: Where training stands.

    Raises:
        NotSavedError: If any rank failed.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    if place == "validation":
        rerun_validation(checkpoint["loops"])
    elif place == "epoch_start":
        begin_epoch(checkpoint["loops"])
    for key in _SETTINGS & checkpoint.keys():
        checkpoint[key] = redacted(checkpoint[key])
    # Strategies that shard have a checkpoint IO and do not use it.
    one_file = type(trainer.strategy).save_checkpoint is Strategy.save_checkpoint
    commits_itself = one_file and isinstance(innermost_io(trainer), AtomicCheckpointIO)
    is_zero = trainer.is_global_zero
    if is_zero:
        path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        if is_zero:
            _require_room(path.parent, size)
        trainer.strategy.save_checkpoint(checkpoint, path, storage_options=manifest if commits_itself else None)

    def commit() -> None:
        if is_zero:
            dataclasses.replace(manifest, files=contents(path)).write(path)

    with contextlib.nullcontext() if commits_itself or not is_zero else unfinished(path, remove):
        _together(trainer, save)
        if not commits_itself:
            _together(trainer, commit)


def finish(trainer: Trainer, wait: bool = True) -> None:
    """Wait for a save that goes on in the background; without ``wait``, only if it has failed already.

    Raises:
        NotSavedError: If it failed.
    """
    io = checkpoint_io(trainer)
    if isinstance(io, AsyncCheckpointIO):
        ends, failed = io.teardown, io._error is not None
    elif isinstance(io, BackgroundCheckpointIO):
        ends, failed = io.finish, io.has_failed()
    else:
        return
    _together(trainer, ends if wait or failed else lambda: None)


def _together(trainer: Trainer, act: Callable[[], None]) -> None:
    """Do something on all ranks, and go on when all have returned and none has failed."""
    failure = ""
    try:
        act()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        _forget_failure(trainer)
    failures = [found for found in _ranks.gather(trainer, failure) if found]
    if failures:
        raise NotSavedError(failures[0])


def checkpoint_io(trainer: Trainer) -> Any:
    """The trainer's checkpoint IO, or None where the strategy writes by itself."""
    try:
        return trainer.strategy.checkpoint_io
    except NotImplementedError:
        return None


def innermost_io(trainer: Trainer) -> Any:
    """What writes the file, inside all wrappers."""
    io = checkpoint_io(trainer)
    while isinstance(io, _WrappingCheckpointIO):
        io = io.checkpoint_io
    return io


def install(trainer: Trainer) -> Callable[[], None]:
    """Put :class:`AtomicCheckpointIO` in the place of Lightning's own IO, and verify folders before they are loaded.

    Returns:
        What takes both away again.
    """
    strategy = trainer.strategy
    load = strategy.load_checkpoint
    strategy.load_checkpoint = partial(_load, load)  # type: ignore[method-assign]
    outer = checkpoint_io(trainer)
    wrapper = None
    io = outer
    while isinstance(io, _WrappingCheckpointIO):
        wrapper, io = io, io.checkpoint_io
    replaced = type(io) is TorchCheckpointIO
    if replaced and wrapper is None:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif replaced and wrapper is not None:
        wrapper._checkpoint_io = AtomicCheckpointIO()

    def uninstall() -> None:
        vars(strategy).pop("load_checkpoint", None)
        if replaced and wrapper is None:
            strategy.checkpoint_io = outer
        elif replaced and wrapper is not None:
            if isinstance(outer, AsyncCheckpointIO) and outer._executor is not None:
                outer._executor.shutdown(wait=True)  # what waits there was promised to be written by ours
                outer._executor = None
            wrapper._checkpoint_io = io

    return uninstall


def environment(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint is written with."""
    return {
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "saved_at": time.time(),  # for people, and to tell runs apart; which checkpoint is newer does not hang on it
    }


def _load(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    folder = Path(path)
    if folder.is_dir() and manifest_path(folder).exists():
        try:
            verify(folder)
        except CheckpointError as error:
            raise CheckpointError(f"the checkpoint {folder} is not what was saved: {error}") from None
    return load(path, *args, **kwargs)


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"there are {free / 2**20:,.0f} MiB free in {folder}, and a checkpoint takes {size / 2**20:,.0f} MiB"
        )


def _forget_failure(trainer: Trainer) -> None:
    # Lightning's asynchronous IO raises the first error again at every later save.
    io = checkpoint_io(trainer)
    if isinstance(io, AsyncCheckpointIO):
        io._error = None
