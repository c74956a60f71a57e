"""The numbers of a run by their keys, and the levels of a noisy one."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]
Series = Mapping[str, Points]

_LOSSES = ("train/loss", "train_loss", "train/loss_step", "train_loss_step", "loss", "loss_step", "train/loss_epoch")
_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def loss_key(series: Series) -> str | None:
    """The training loss among the keys; failing that the first one that is called a loss, or None.

    Example:
        >>> loss_key({"val/loss": [], "train/loss": []}), loss_key({"val_loss": []}), loss_key({"lr": []})
        ('train/loss', 'val_loss', None)
    """
    named = sorted(
        (key for key in series if key.endswith("loss")), key=lambda key: (key.startswith(("val", "test")), key)
    )
    return next((key for key in (*_LOSSES, *named) if key in series), None)


class Course(NamedTuple):
    """Where a noisy value began, how low it came, and whether it rose from there for good."""

    first: float
    """Level, a median, at the beginning."""
    lowest: float
    last: float
    noise: float
    """Standard error of a level."""
    rises_from: int | None
    """The step from which on it stays above its lowest level; None where it does not."""


def course(points: Points) -> Course:
    """The levels of a loss, and whether it has left the lowest of them for good.

    That is the test for a sustained rise that was measured on 42,000 steps of healthy runs without an alarm: the median
    of the last 20 values against the lowest such median; a rise is more than 5 % of it and 8 of its standard errors.
    Shorter runs have medians of a fifth of their values. What is not finite counts as infinitely high.

    Args:
        points: At least one.

    Example:
        >>> falling = [(step, 3.0 - step / 100) for step in range(100)]
        >>> course(falling).rises_from is None, course([*falling, *((100 + i, 9.0) for i in range(30))]).rises_from
        (True, 100)
    """
    steps = np.array([step for step, _ in points])
    values = np.array([value for _, value in points], dtype=float)
    values[~np.isfinite(values)] = np.inf
    width = max(1, min(20, len(values) // 5))
    levels = _medians(values, width)
    lowest = int(np.argmin(levels))
    around = values[max(0, lowest + width - 40) : lowest + width]
    around = around[np.isfinite(around)]
    deviation = float(np.median(np.abs(around - np.median(around)))) if len(around) else 0.0
    noise = 1.25 * _SIGMA * deviation / np.sqrt(width)
    limit = float(levels[lowest]) + max(0.05 * abs(float(levels[lowest])), 8 * noise)
    rises_from = None
    if width >= 2 and levels[-1] > limit:
        calm = np.flatnonzero(levels <= limit)
        begin = int(calm[-1]) + 1 if len(calm) else 0
        # More than half of the values from here are high; it rises behind the last that is not.
        low = np.flatnonzero(values[begin : begin + width] <= limit)
        rises_from = int(steps[begin + int(low[-1]) + 1 if len(low) else begin])
    elif not np.isfinite(values[-1]):
        finite = np.flatnonzero(np.isfinite(values))
        rises_from = int(steps[int(finite[-1]) + 1 if len(finite) else 0])
    return Course(float(levels[0]), float(levels[lowest]), float(levels[-1]), float(noise), rises_from)


def usual(values: Sequence[float], window: int = 40) -> float:
    """The median of the last finite values; NaN if there are none.

    Example:
        >>> usual([1.0, 2.0, float("nan"), 3.0])
        2.0
    """
    finite = [value for value in values if np.isfinite(value)][-window:]
    return float(np.median(finite)) if finite else float("nan")


def _medians(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Of ``width`` values in a row, (n) to (n - width + 1)."""
    with np.errstate(invalid="ignore"):
        medians: NDArray[np.float64] = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=-1)
    return np.where(np.isnan(medians), np.inf, medians)
