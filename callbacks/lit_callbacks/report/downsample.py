"""Fewer points that show the same: no spike is lost."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_callbacks.health import Points


class Envelope(NamedTuple):
    """Buckets of steps with lowest, median and highest finite value; the steps of what is not finite."""

    steps: list[int]
    low: list[float]
    middle: list[float]
    high: list[float]
    not_finite: list[int]

    @property
    def is_thinned(self) -> bool:
        """Whether a bucket may hold more than one value."""
        return self.middle is not self.high


def envelope(points: Points, buckets: int, reach: tuple[int, int] | None = None) -> Envelope:
    """At most so many buckets, of equal width in steps.

    Args:
        points: By step.
        buckets: How many.
        reach: First and last step of the axis; those of the points by default.

    Example:
        >>> spike = [(step, 9.0 if step == 777 else 1.0) for step in range(1000)]
        >>> found = envelope(spike, 10)
        >>> len(found.steps), max(found.middle), max(found.high)
        (10, 1.0, 9.0)
    """
    if not len(points):
        return Envelope([], [], [], [], [])
    steps = np.array([step for step, _ in points])
    values = np.array([value for _, value in points], dtype=float)
    good = np.isfinite(values)
    lost = sorted(set(steps[~good].tolist()))
    if len(lost) > buckets:
        lost = [lost[i * len(lost) // buckets] for i in range(buckets)]
    steps, values = steps[good], values[good]
    if len(steps) <= buckets:
        listed = values.tolist()
        return Envelope(steps.tolist(), listed, listed, listed, lost)
    first, last = reach or (int(steps[0]), int(steps[-1]))
    bucket = np.minimum((steps - first) * buckets // max(1, last - first + 1), buckets - 1)
    parts = np.split(values, np.flatnonzero(np.diff(bucket)) + 1)
    centres = np.split(steps, np.flatnonzero(np.diff(bucket)) + 1)
    return Envelope(
        [int(part[len(part) // 2]) for part in centres],
        [float(part.min()) for part in parts],
        [float(np.median(part)) for part in parts],
        [float(part.max()) for part in parts],
        lost,
    )


class Grid(NamedTuple):
    """A value for each row and bucket of steps: NaN where nothing was measured, infinite where that was not finite."""

    names: list[str]
    edges: list[int]
    """First step of each bucket, and the last step of all plus one."""
    cells: list[list[float]]


def grid(rows: dict[str, Points], buckets: int, keep: Literal["max", "min"]) -> Grid:
    """Rows over steps, of each bucket the value that is worst.

    Args:
        rows: Points by name.
        buckets: At most so many; fewer where fewer steps were measured.
        keep: What is worst.

    Example:
        >>> grid({"a": [(0, 1.0), (1, 5.0), (2, 2.0), (3, 0.0)]}, buckets=2, keep="max")
        Grid(names=['a'], edges=[0, 2, 4], cells=[[5.0, 2.0]])
    """
    measured = sorted({step for points in rows.values() for step, _ in points})
    if not measured:
        return Grid([], [], [])
    first, last = measured[0], measured[-1] + 1
    count = min(buckets, len(measured))
    edges = [first + i * (last - first) // count for i in range(count)] + [last]
    cells = [_row(points, np.array(edges), keep) for points in rows.values()]
    return Grid(list(rows), edges, cells)


def _row(points: Points, edges: NDArray[np.int64], keep: Literal["max", "min"]) -> list[float]:
    row = np.full(len(edges) - 1, np.nan)
    if len(points):
        values = np.array([value for _, value in points], dtype=float)
        at = np.searchsorted(edges, [step for step, _ in points], side="right") - 1
        good = np.isfinite(values)
        (np.fmax if keep == "max" else np.fmin).at(row, at[good], values[good])
        row[at[~good]] = np.inf
    # A bucket between two measurements has the value of the one before.
    known = np.flatnonzero(~np.isnan(row))
    if len(known):
        before = np.maximum.accumulate(np.where(np.isnan(row), 0, np.arange(len(row))))
        inside = np.arange(known[0], known[-1] + 1)
        row[inside] = row[before[inside]]
    return [float(value) for value in row]
