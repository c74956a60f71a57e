"""The numbers of a run, from whatever file its logger wrote."""

import csv
import math
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

Numbers = dict[str, list[tuple[int, float]]]

_LONG = ["step", "key", "value"]
LARGEST = 3.5e38
"""As far as fp32 goes; what is beyond counts as infinite."""
_MOST_STEPS = 2**53  # as exact as a float is


def read_csv(path: Path) -> tuple[Numbers, int]:
    """The series of a ``metrics.csv``, and how many of its lines made no sense.

    Two forms are known: a ``step,key,value`` line per number, as ``lit_transformer`` writes it, and Lightning's
    CSVLogger, a column per key. A file that is cut off in the middle of a line is read up to there.

    Args:
        path: The file.

    Raises:
        ValueError: If it has neither form.
        OSError: If it cannot be read.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = (line.replace("\0", "") for line in file)
        rows = _rows(line for line in lines if line.endswith(("\n", "\r")))
        header = next(rows, None)
        if header is None:
            return {}, 0
        if header == _LONG:
            return _read_long(rows)
        if "step" in header:
            return _read_wide(header, rows)
    raise ValueError(f"{path} must begin with the line step,key,value or have a column called step, got {header[:5]}")


def _rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Each line by itself: in a damaged file a quote must not swallow the lines behind it."""
    for line in lines:
        if '"' not in line:
            yield line.rstrip("\r\n").split(",")
            continue
        try:
            yield next(csv.reader([line]), [])
        except csv.Error:
            yield []


def _step(text: str) -> int:
    step = float(text)
    if not abs(step) < _MOST_STEPS:
        raise ValueError(f"expected a step, got {text}")
    return int(step)


def _read_long(rows: Iterable[list[str]]) -> tuple[Numbers, int]:
    series: Numbers = {}
    bad = 0
    for row in rows:
        try:
            step, key, value = row
            point = (_step(step), number(value))
        except ValueError:
            bad += row != _LONG
            continue
        if key in series:
            series[key].append(point)
        else:
            series[key] = [point]
    return {key: in_order(points) for key, points in series.items()}, bad


def _read_wide(header: list[str], rows: Iterable[list[str]]) -> tuple[Numbers, int]:
    series: Numbers = {key: [] for key in header if key != "step"}
    bad = 0
    for row in rows:
        try:
            named = dict(zip(header, row, strict=True))
            step = _step(named.pop("step"))
            numbers = {key: number(value) for key, value in named.items() if value}
        except ValueError:
            bad += 1
            continue
        for key, value in numbers.items():
            series[key].append((step, value))
    return {key: in_order(points) for key, points in series.items() if points}, bad


def number(text: str | float) -> float:
    """A number as fp32 has it.

    Example:
        >>> number("1.5"), number("-1e300")
        (1.5, -inf)
    """
    value = float(text)
    return value if -LARGEST <= value <= LARGEST or math.isnan(value) else math.copysign(math.inf, value)


def in_order(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """By step, and of two values of one step the later: a run that was resumed wrote it again.

    Example:
        >>> in_order([(0, 3.0), (1, 2.0), (2, 9.0), (1, 2.5)])
        [(0, 3.0), (1, 2.5), (2, 9.0)]
    """
    if all(a[0] < b[0] for a, b in pairwise(points)):
        return points
    return sorted(dict(points).items())


def read_tensorboard(files: Iterable[Path]) -> Numbers:
    """The scalars of TensorBoard's event files.

    Raises:
        ImportError: If tensorboard is not installed.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    series: Numbers = {}
    events = chain.from_iterable(LegacyEventFileLoader(str(path)).Load() for path in sorted(files))
    for event in events:
        for value in event.summary.value:
            number = _scalar(value)
            if number is not None:
                series.setdefault(value.tag, []).append((event.step, number))
    return {key: in_order(points) for key, points in series.items()}


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return number(value.simple_value)
    if value.HasField("tensor") and not value.tensor.tensor_shape.dim:
        numbers = [*value.tensor.float_val, *value.tensor.double_val]
        return number(numbers[0]) if numbers else None
    return None


def steps_of(series: Numbers) -> Iterator[int]:
    """The last step of each series."""
    return (points[-1][0] for points in series.values() if points)
