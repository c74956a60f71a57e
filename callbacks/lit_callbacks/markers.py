"""Small files in the run folder that tell other processes how a run stands."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_callbacks._events import run_folder

FINISHED = "finished.json"
STOPPED = "stopped.json"
HEARTBEAT = "heartbeat.json"


def mark_finished(trainer: Trainer, step: int | None) -> None:
    """Write the file that says a run has come to its end, or with None take it away. All ranks together.

    An exit code cannot say it: launchers invent their own, and Lightning 2.6.6 exits with 0 on SIGTERM.
    """
    path = run_folder(trainer) / FINISHED
    if not trainer.is_global_zero:
        return
    if step is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def clear(folder: Path, marker: str) -> None:
    """Take a marker away."""
    (folder / marker).unlink(missing_ok=True)


def finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / FINISHED).exists()


def last_beat(folder: Path) -> int:
    """The step that the run in a folder has reached by its heartbeat; 0 where there is none."""
    try:
        facts: Any = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
        return int(facts["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
