"""Metrics as a file that is only ever appended to."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

_HEADER = ["step", "key", "value"]


class MetricsFile(Logger):
    """Log to ``metrics.csv``, one ``step,key,value`` line per number.

    A line per number, because a table would have to be rewritten for every new key; Lightning's CSVLogger does so, and
    deletes the file when a run goes on. With pandas the table is
    ``pd.read_csv(path).pivot(index="step", columns="key", values="value")``.

    Args:
        path: The file.
        pending: A row of an earlier step that the resumed run logs again, ``{"step": …, "metrics": …}``, because it may
            not have come so far.
        resume_step: Drop the lines of this and later steps, which the resumed run writes again; None drops none. That
            happens with the first number that comes: a run that has no step left to make keeps them.

    Cost: one write of the line per number, flushed once per call.
    """

    def __init__(self, path: Path, resume_step: int | None = None, pending: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.path = path
        self._warned = False
        self._resume_step, self._pending = resume_step, pending

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
        rows = [[step, key, f"{float(value):.8g}"] for key, value in metrics.items() if key != "epoch"]
        try:
            if self._resume_step is not None:
                cut_back(self.path, self._resume_step, self._pending)
                self._resume_step = None
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows if file.tell() else [_HEADER, *rows])
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"Metrics are not being written down: {error}. Training goes on.")
            self._warned = True

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has the whole configuration."""


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The ``(step, value)`` pairs of every key; a torn last line is left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for step, key, value in _rows(path):
        series.setdefault(key, []).append((int(step), float(value)))
    return series


def cut_back(path: Path, step: int, pending: Mapping[str, Any] | None = None) -> None:
    """Drop the lines of ``step`` and later, of a pending row, and a torn last line; the file is replaced at once."""
    if not path.exists():
        return
    again = set() if pending is None else {(str(pending["step"]), key) for key in pending["metrics"]}
    kept = [row for row in _rows(path) if int(row[0]) < step and (row[0], row[1]) not in again]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_HEADER, *kept])
    temporary.replace(path)


def _rows(path: Path) -> Iterator[list[str]]:
    """The whole lines, without the header."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.reader(line for line in file if line.endswith("\n")):
            if len(row) == len(_HEADER) and row != _HEADER:
                yield row
