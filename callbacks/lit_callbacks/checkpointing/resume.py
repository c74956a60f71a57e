"""Which checkpoint does a run go on from? The newest one that is as it was written."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lit_callbacks.checkpointing._durable import unfinished_names
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.manifest import SUFFIX, Manifest, manifest_path, read_manifest, verify

_EXTENSION = ".ckpt"


class ResumePoint(NamedTuple):
    """A checkpoint that verifies, and those newer ones that do not."""

    path: Path
    manifest: Manifest
    rejected: list[tuple[Path, str]]
    """Newer ones and those that tell nothing of themselves, each with what is wrong with it."""
    steps_lost: int
    """Optimizer steps between it and the newest one that is known of."""

    def describe(self) -> str:
        """One line for the newest checkpoint, or a paragraph that says what was passed over and what it costs."""
        first = f"Going on from step {self.manifest.step}, {self.path}."
        if not self.rejected:
            return first
        others = "; ".join(f"{path.name}: {reason}" for path, reason in self.rejected)
        lost = f" {self.steps_lost} steps are lost and will be made again." if self.steps_lost else ""
        return f"{first} Passed over: {others}.{lost}"


def newest_checkpoint(folders: Iterable[Path], reached: int = 0) -> ResumePoint | None:
    """The newest checkpoint that verifies, by what the manifests say; None where nothing was ever saved.

    The order is by attempt, then by step. File times count for nothing: a clock may jump, and a copy has new ones.

    Args:
        folders: Where to look.
        reached: The step that the run is known to have reached, by its heartbeat for example.

    Raises:
        CheckpointError: If there are checkpoints, and none of them verifies: a run must not start anew in silence.

    Cost: reads the newest checkpoint once; older ones only where newer ones are damaged.
    """
    known: list[tuple[Path, Manifest]] = []
    rejected: list[tuple[Path, str]] = []
    for path in sorted(_candidates(folders)):
        try:
            known.append((path, read_manifest(path)))
        except CheckpointError as error:
            rejected.append((path, str(error)))
    known.sort(key=lambda item: (item[1].attempt, item[1].step, item[1].owner), reverse=True)
    reached = max([reached, *(manifest.step for _, manifest in known[:1])])
    for path, manifest in known:
        try:
            if manifest.suspect:
                raise CheckpointError(manifest.suspect)
            verify(path)
        except CheckpointError as error:
            rejected.append((path, str(error)))
        else:
            return ResumePoint(path, manifest, rejected, reached - manifest.step)
    if not rejected:
        return None
    listed = "\n  ".join(f"{path}: {reason}" for path, reason in rejected)
    raise CheckpointError(
        f"there are checkpoints, but none of them can be trusted, so the run is neither resumed nor begun anew:\n"
        f"  {listed}\nPass one of them as a file if you know it is good, or move them away to begin anew."
    )


def _candidates(folders: Iterable[Path]) -> set[Path]:
    """Checkpoints, and manifests whose checkpoint is gone.

    A link is only another name, unless it leads nowhere. A file that was never completed is not a checkpoint, if it is
    known to be one of ours.
    """
    found: set[Path] = set()
    for folder in folders:
        if folder.is_dir():
            torn = {name for name in unfinished_names(folder) if not manifest_path(folder / name).exists()}
            for path in folder.glob(f"[!.]*{_EXTENSION}"):
                if path.name not in torn and not (path.is_symlink() and path.exists()):
                    found.add(path)
            found |= {path.with_name(path.name.removesuffix(SUFFIX)) for path in folder.glob(f"[!.]*{SUFFIX}")}
    return found
