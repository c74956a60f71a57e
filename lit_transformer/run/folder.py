"""A run has a folder: configuration, metrics, events, checkpoints, figures."""

import contextlib
import os
import time
from pathlib import Path

from lit_transformer.errors import UsageError

# Processes that Lightning launches for further devices inherit the name that the first one made up.
_NAME_FOR_CHILDREN = "LIT_TRANSFORMER_RUN"


class RunFolder:
    """The folder of one run, ``<root>/<name>``.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.checkpoints = path / "checkpoints"
        self.last_good = path / "last_good.ckpt"
        """Written by LossSpikeRecovery when it stops a run."""
        self.wandb_id = path / "wandb_id.txt"

    @classmethod
    def create(cls, root: Path, name: str | None) -> "RunFolder":
        """Make the folder of a new run; without a name it is called after the time.

        Raises:
            UsageError: If a run of that name exists, or the folder cannot be written.
        """
        inherited = os.environ.get(_NAME_FOR_CHILDREN)
        if inherited is not None and "LOCAL_RANK" in os.environ:
            return cls(Path(inherited))
        if name is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "a run that is launched as several processes needs one name for all of them; add --run NAME"
            )
        path = _free_path(root) if name is None else root / name
        first_process = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0
        if first_process and (path / "config.yaml").exists():
            raise UsageError(
                f"there is a run in {path} already; choose another --run NAME, or go on with it by "
                f"--run {path.name} --ckpt_path last"
            )
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"cannot write the run folder {path}: {error.strerror}; choose another place with "
                "--trainer.default_root_dir FOLDER"
            ) from None
        os.environ[_NAME_FOR_CHILDREN] = str(path)
        return cls(path)

    @classmethod
    def existing(cls, root: Path, name: str) -> "RunFolder":
        """The folder of a run that has been started.

        Raises:
            UsageError: If there is no such run.
        """
        run = cls(root / name)
        if not run.config.is_file() and not run.checkpoints.is_dir():
            raise UsageError(f"there is no run in {run.path}; {_existing(root)}")
        return run

    @classmethod
    def all(cls, root: Path) -> list["RunFolder"]:
        """The folders of all runs."""
        return [cls(path.parent) for path in sorted(root.glob("*/checkpoints"))]

    def owns(self, checkpoint: str) -> bool:
        """Whether a file lies in this folder: then a run that goes on from it goes on in place."""
        return Path(checkpoint).resolve().is_relative_to(self.path.resolve())

    def remove_if_empty(self) -> None:
        """Leave nothing behind of a run that never started."""
        with contextlib.suppress(OSError):
            self.checkpoints.rmdir()
            self.path.rmdir()


def _free_path(root: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{i}" for i in range(2, 1000))]
    return next(root / name for name in names if not (root / name).exists())


def _existing(root: Path) -> str:
    runs = sorted(path.parent.name for path in root.glob("*/checkpoints"))
    return f"the runs there are {', '.join(runs[-5:])}" if runs else f"there are no runs under {root}"
