"""What was done to a run, one JSON object per line, in ``events.jsonl`` of the run folder."""

import json
import logging
import math
from pathlib import Path
from typing import Any
from weakref import ref

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_callbacks._listeners import tell_event
from lit_callbacks._pictures import logger_kind

FILENAME = "events.jsonl"


_BEGINNING: dict[Path, "ref[Trainer]"] = {}


def run_folder(trainer: Trainer) -> Path:
    """Where this run keeps its files: in the first logger's folder. All ranks must ask together.

    That of W&B, which is the same for all runs, only where there is no logger beside it that has one for each.
    """
    loggers = trainer.loggers
    if loggers and logger_kind(loggers[0]) == "WandbLogger":
        folders = [getattr(logger, "log_dir", None) for logger in loggers]
        if (own := next((folder for folder in folders if isinstance(folder, str)), None)) is not None:
            return Path(trainer.strategy.broadcast(own))
    return Path(trainer.log_dir or trainer.default_root_dir)


def begin(trainer: Trainer) -> None:
    """Remember, at setup, that a run may begin in a folder with the events of another. All ranks together."""
    folder = run_folder(trainer)
    trial = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not trial and not trainer.global_step and (folder / FILENAME).is_file():
        _BEGINNING[folder] = ref(trainer)


def begun(trainer: Trainer) -> None:
    """Write down that a run has begun there, once Lightning has told whether it goes on from a checkpoint."""
    for folder in [folder for folder, beginning in _BEGINNING.items() if beginning() is trainer]:
        del _BEGINNING[folder]
        if trainer.ckpt_path is None:
            EventLog(folder).write(step=0, event="begin")


@rank_zero_only
def say(text: str) -> None:
    """Say on the console what was done or found, as a line of Lightning's log.

    Not as a warning, for which Python would print the place in the source as well.
    """
    logging.getLogger("lightning.pytorch").getChild("lit_callbacks").warning(text)


class EventLog:
    """Appends events on rank zero. A folder that cannot be written to costs the events and one warning, not the run."""

    def __init__(self, folder: Path | None = None, filename: str = FILENAME) -> None:
        self._path = folder / filename if folder else None
        self._warned = False

    @rank_zero_only
    def write(self, **event: Any) -> None:
        """Append one event and flush it. Entries that are None are left out, and NaN is written as ``"nan"``."""
        if self._path is None:
            return
        if (beginning := _BEGINNING.get(self._path.parent)) is not None and (trainer := beginning()) is not None:
            begun(trainer)
        plain = {key: _plain(value) for key, value in event.items() if value is not None}
        line = json.dumps(plain, allow_nan=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"Events of this run are not being written down: {error}")
            self._warned = True
        if self._path.name == FILENAME:
            tell_event(self._path.parent, plain)


def _plain(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
