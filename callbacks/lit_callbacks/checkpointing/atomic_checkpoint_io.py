"""Checkpoint files that are whole or not there, and are read without running what is in them."""

import dataclasses
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from lit_callbacks.checkpointing._durable import HashedFile, replace_durably, unfinished
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.manifest import Content, Manifest, manifest_path, verify


class AtomicCheckpointIO(CheckpointIO):
    """Save to a temporary file in the same folder, sync, rename, sync the folder; verify before loading.

    For strategies that write one file: a single device and DDP. :class:`VerifiedCheckpoint` puts it in place by itself;
    with other checkpoint callbacks, ``Trainer(plugins=[AtomicCheckpointIO()])``. Lightning's
    ``AsyncCheckpointIO(AtomicCheckpointIO())`` works. It serves ``lightning.pytorch``.

    A file that has a manifest is compared with it, others are at least read through (each tensor in a checkpoint has a
    CRC-32, which ``torch.load`` does not look at). Loading is with ``weights_only=True`` unless it is told otherwise.

    Raises:
        CheckpointError: On loading, if the file is missing, torn or changed, holds anything but plain data, or is not
            on a local disk.

    Cost: saving, the time of ``torch.save`` and ``fsync``, a digest beside the ``fsync``, and no copy in memory;
    loading, one more pass over the file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; with a :class:`Manifest` as ``storage_options``, commit it by that."""
        target = local(path)
        target.parent.mkdir(parents=True, exist_ok=True)

        def write(file: HashedFile) -> None:
            torch.save(checkpoint, cast(IO[bytes], file))  # which needs write and flush

        if not isinstance(storage_options, Manifest):
            manifest_path(target).unlink(missing_ok=True)  # it describes what is about to be replaced
            replace_durably(target, write)
            return
        with unfinished(target, remove):
            content = Content(*replace_durably(target, write))
            dataclasses.replace(storage_options, files={".": content}).write(target)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and read a checkpoint."""
        return load_verified(local(path), map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, and then its manifest."""
        remove(local(path))


def local(path: str | Path) -> Path:
    """The path of a checkpoint on a local disk.

    Raises:
        CheckpointError: For a URL. Lightning loads those with ``weights_only=False``, which runs code.

    Example:
        >>> local("https://example.org/model.ckpt")
        Traceback (most recent call last):
        ...
        lit_callbacks.checkpointing._errors.CheckpointError: https://example.org/model.ckpt is not on a local disk: \
download it, compare its SHA-256 with the one its author gives, and pass the file
    """
    if "://" in str(path):
        raise CheckpointError(
            f"{path} is not on a local disk: download it, compare its SHA-256 with the one its author gives, and pass "
            "the file"
        )
    return Path(path)


def load_verified(path: Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint file after verifying it; of one in parts, which a sharded strategy saves as a folder, the rest.

    Raises:
        CheckpointError: If it is missing, torn or changed, or holds anything but plain data.
    """
    rest = _rest_of(path)
    if not path.is_file() and not rest.is_file():
        what = "a link to a file that is gone" if path.is_symlink() else "no file"
        raise CheckpointError(f"there is no checkpoint {path}: it is {what}")
    if manifest_path(path.resolve()).exists():
        try:
            verify(path.resolve())
        except CheckpointError as error:
            raise CheckpointError(f"the checkpoint {path} is not what was saved: {error}") from None
    elif path.is_file():
        _read_through(path)
    try:
        loaded: dict[str, Any] = torch.load(
            path if path.is_file() else rest,
            map_location=map_location,
            weights_only=True if weights_only is None else weights_only,
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the checkpoint {path} holds objects that are not plain data, so it was not loaded and nothing of it was "
            f"run: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {_first_line(error)}") from error
    return loaded


def _rest_of(folder: Path) -> Path:
    """Where a checkpoint in parts has what is no weight and no optimizer state."""
    of_deepspeed = sorted((folder / "checkpoint").glob("*model_states.pt"))
    return of_deepspeed[0] if of_deepspeed else folder / "meta.pt"


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, and then its manifest: killed in between, what is left is a manifest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def _read_through(path: Path) -> None:
    if path.stat().st_size == 0:
        raise CheckpointError(f"the checkpoint {path} is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen kinds for what is none
        raise CheckpointError(f"the checkpoint {path} is torn, or is none: {_first_line(error)}") from None
    if bad is not None:
        raise CheckpointError(f"the checkpoint {path} has changed since it was saved: {bad} does not match its CRC-32")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
