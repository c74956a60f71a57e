"""The checkpoints of one callback in one folder: which are kept, which are the best, and what may go."""

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from lit_callbacks.checkpointing._durable import temporary_beside
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.atomic_checkpoint_io import remove
from lit_callbacks.checkpointing.manifest import SUFFIX, Manifest, manifest_path, read_manifest

LAST = "last.ckpt"


class Kept(NamedTuple):
    """A checkpoint and its manifest."""

    path: Path
    manifest: Manifest


def committed(folder: Path) -> list[Kept]:
    """The checkpoints in a folder that were completed, by name; what is in them is not looked at."""
    found: list[Kept] = []
    for file in sorted(folder.glob(f"[!.]*{SUFFIX}")):
        path = file.with_name(file.name.removesuffix(SUFFIX))
        with contextlib.suppress(CheckpointError):
            found.append(Kept(path, read_manifest(path)))
    return found


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was committed."""
    return manifest_path(path).exists()


def free_name(path: Path, given: Collection[str] = ()) -> Path:
    """The path, or with ``-v1``, ``-v2``, … in its name, that neither exists nor is among those ``given`` away."""
    version, free = 0, path
    while str(free) in given or free.exists() or free.is_symlink() or manifest_path(free).exists():
        version += 1
        free = path.with_name(f"{path.stem}-v{version}{path.suffix}")
    return free


def prune(folder: Path, run: str, owner: str, step: int, keep: Iterable[Path]) -> None:
    """Delete what a callback has saved earlier in this run and no longer wants.

    It looks at the folder and not at what it remembers, so that whatever a killed process has left goes too. What lies
    ahead of ``step`` stays: it is of a branch that was left by going back to an older checkpoint, and goes when this
    one has come as far.
    """
    wanted = {path.resolve() for path in keep}
    for path, manifest in committed(folder):
        ours = manifest.run == run and manifest.owner == owner and manifest.step <= step
        if ours and path.resolve() not in wanted:
            remove(path)


def ranked(folder: Path, run: str, owner: str, step: int, mode: str) -> list[tuple[str, float]]:
    """What a callback has saved in this run up to a step, with its scores, best first."""
    scores = [
        (str(path), manifest.score)
        for path, manifest in committed(folder)
        if (manifest.run, manifest.owner, manifest.suspect) == (run, owner, None)
        if manifest.score is not None and manifest.step <= step and path.exists()
    ]
    return sorted(scores, key=lambda item: item[1], reverse=mode == "max")


def link_last(folder: Path) -> None:
    """Let ``last.ckpt`` name the newest checkpoint, for people; a file of that name is left alone."""
    link = folder / LAST
    kept = [kept for kept in committed(folder) if not kept.manifest.suspect]
    if not kept or (link.exists() and not link.is_symlink()):
        return
    newest = max(kept, key=lambda kept: (kept.manifest.attempt, kept.manifest.step, kept.manifest.owner))
    temporary = temporary_beside(link, "partial")
    with contextlib.suppress(OSError):  # Windows needs a permission for links
        temporary.symlink_to(newest.path.name)
        temporary.replace(link)
