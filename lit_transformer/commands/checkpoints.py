"""Which run, and which of its checkpoints, does a command mean?"""

import contextlib
from pathlib import Path
from typing import Any

from lit_callbacks import CheckpointError
from lit_callbacks.checkpointing import ResumePoint, committed, load_verified, local, newest_checkpoint, verify
from lit_callbacks.markers import last_beat
from lit_transformer.errors import UsageError
from lit_transformer.run.folder import RunFolder

_NOTHING = "nothing to resume or evaluate: no run under {} has a checkpoint; give one by --ckpt_path FILE"

_IN_PARTS = (
    "{0} is in parts, as a sharded strategy saves it: make it one file by `consolidate --ckpt_path {0} --to FILE.ckpt`"
    ", and take that"
)


def find_run(root: Path, name: str | None) -> RunFolder:
    """The run of that name; without a name, the one that saved a checkpoint last.

    Raises:
        UsageError: If there is no such run.
    """
    if name is not None:
        return RunFolder.existing(root, name)
    newest = max(((saved_at, run.path) for run in RunFolder.all(root) if (saved_at := _saved_at(run))), default=None)
    if newest is None:
        raise UsageError(_NOTHING.format(root))
    return RunFolder(newest[1])


def resume_point(run: RunFolder) -> ResumePoint | None:
    """The newest checkpoint of a run that verifies; None if it has never saved any.

    Raises:
        UsageError: If it has checkpoints, and none of them can be trusted.
    """
    try:
        return newest_checkpoint([run.checkpoints], last_beat(run.path))
    except CheckpointError as error:
        raise UsageError(str(error)) from None


def locate(root: Path, name: str | None, which: str) -> Path:
    """The checkpoint that ``last`` or ``best`` means, for a command that evaluates.

    Raises:
        UsageError: If there is none.
    """
    run = find_run(root, name)
    if which == "last" and (point := resume_point(run)) is not None:
        return point.path
    if which == "best" and (best := _best(run)) is not None:
        return best
    if which == "best" and (point := resume_point(run)) is not None:
        raise UsageError(
            f"the run in {run.path} has no best checkpoint; it may have ended before its first validation. Take its "
            f"last one: --ckpt_path last, which is {point.path}"
        )
    raise UsageError(f"the run in {run.path} has no {which} checkpoint; it may have ended before its first one")


def load_checkpoint(path: str | Path, weights: bool = True) -> dict[str, Any]:
    """A checkpoint's contents, verified, on the CPU and without unpickling code.

    Args:
        path: Where it is.
        weights: Whether they are needed; of a checkpoint in parts only the rest is read.

    Raises:
        UsageError: If there is no such file, or it cannot be trusted, or is in parts although weights are needed.
    """
    try:
        checkpoint = load_verified(local(path))
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    if is_in_parts(path):
        if weights:
            raise UsageError(_IN_PARTS.format(path))
    elif "state_dict" not in checkpoint:
        raise UsageError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def chosen(root: Path, name: str | None, which: str) -> Path:
    """The checkpoint that ``last`` or ``best`` means, or that of a path.

    Raises:
        UsageError: If there is none, or it is not on a local disk.
    """
    if which in ("last", "best"):
        return locate(root, name, which)
    try:
        return local(which)
    except CheckpointError as error:
        raise UsageError(str(error)) from None


def of_a_run(path: str) -> str:
    """The best checkpoint of a run, if its folder is named; else the path as it is.

    Raises:
        UsageError: If the run has none, or it is in parts.
    """
    run = RunFolder(Path(path))
    if not run.checkpoints.is_dir():
        return path
    best = locate(run.path.parent, run.path.name, "best")
    if is_in_parts(best):
        raise UsageError(_IN_PARTS.format(best))
    return str(best)


def read_checkpoint(root: Path, name: str | None, which: str) -> dict[str, Any]:
    """The contents of a file, or of what ``last`` or ``best`` means; of one in parts without weights."""
    return load_checkpoint(chosen(root, name, which), weights=False)


def is_in_parts(path: str | Path) -> bool:
    """Whether a checkpoint is a folder with a part of each rank."""
    return Path(path).is_dir()


def _best(run: RunFolder) -> Path | None:
    """The checkpoint with the lowest validation loss, of those that verify."""
    scores = {
        kept.path: kept.manifest.score
        for kept in committed(run.checkpoints)
        if kept.path.name.startswith("best") and kept.manifest.score is not None
    }
    for path in sorted(scores, key=scores.__getitem__):
        with contextlib.suppress(CheckpointError):
            verify(path)
            return path
    return None


def _saved_at(run: RunFolder) -> float:
    """When a run saved its newest checkpoint, by what it wrote down itself; 0 if it never did."""
    return max((float(kept.manifest.environment["saved_at"]) for kept in committed(run.checkpoints)), default=0.0)


def check_for_deepspeed(path: str | Path, command: str) -> None:
    """What the strategy can load.

    Raises:
        UsageError: If the command evaluates, or the checkpoint is one file.
    """
    if command != "fit":
        consolidated = f"make {path} one file by `consolidate`, and " if is_in_parts(path) else ""
        raise UsageError(
            f"DeepSpeed loads its checkpoints with the optimizer, which {command} does not have: "
            f"{consolidated}evaluate {'that' if consolidated else path} on one device or under strategy ddp"
        )
    if not is_in_parts(path):
        raise UsageError(
            f"{path} is one file, and DeepSpeed goes on from a folder that it has saved itself; take the weights of "
            "the file by model.init_args.init_from, or another strategy"
        )
