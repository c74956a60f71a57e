"""Metrics as a file that is only ever appended to."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

_HEADER = ["step", "key", "value"]


class MetricsFile(Logger):
    """Log to ``metrics.csv``, one ``step,key,value`` line per number.

    A line per number, because a table would have to be rewritten for every new key; Lightning's CSVLogger does so, and
    deletes the file when a run goes on. With pandas the table is
    ``pd.read_csv(path).pivot(index="step", columns="key", values="value")``.

    Args:
        path: The file.
        resume_step: Drop the lines of this and later steps, which the resumed run writes again; None drops none.

    Cost: one write of the line per number, flushed once per call.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        if resume_step is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            cut_back(path, resume_step)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.stem

    @property
    def version(self) -> str:
        """The run."""
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        """The run folder; Lightning takes it as the trainer's ``log_dir``."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line per metric."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(_HEADER)
            writer.writerows([step, key, f"{float(value):.8g}"] for key, value in metrics.items() if key != "epoch")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has the whole configuration."""


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The ``(step, value)`` pairs of every key; a torn last line is left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            if len(row) == len(_HEADER) and row != _HEADER:
                series.setdefault(row[1], []).append((int(row[0]), float(row[2])))
    return series


def cut_back(path: Path, step: int) -> None:
    """Drop every line of ``step`` and later, and a torn last line; the file is replaced in one move."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(_HEADER)]
    kept = [row for row in rows if row == _HEADER or int(row[0]) < step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(kept)
    temporary.replace(path)
