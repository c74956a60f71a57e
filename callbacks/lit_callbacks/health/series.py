"""The numbers of a run by their keys, and the levels of a noisy one."""

import math
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]
Series = Mapping[str, Points]

_LOSSES = (
    "train/loss", "train_loss", "train/loss_step", "train_loss_step", "loss", "loss_step", "loss/train",
    "loss/train_step", "training_loss", "train/loss_epoch", "train_loss_epoch", "loss_epoch", "loss/train_epoch",
)  # fmt: skip
_LEVEL, _FIRST = 20, 5  # values
_NEAR_ZERO = 100  # a step; a loss that is known from later on may have fallen before
_JUDGED = 100  # values, fewer of which do not tell a slow beginning from none
FEWEST = 5
"""Values, fewer of which do not tell a rise from a spike."""
_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def loss_key(series: Series) -> str | None:
    """The training loss among the keys; failing that the first one that is called a loss, to be shown; or None.

    Example:
        >>> loss_key({"val/loss": [], "train/loss": []}), loss_key({"val_loss": []}), loss_key({"lr": []})
        ('train/loss', 'val_loss', None)
    """
    named = sorted(
        (key for key in series if key.endswith("loss")), key=lambda key: (key.startswith(("val", "test")), key)
    )
    return training_loss_key(series) or next(iter(named), None)


def training_loss_key(series: Series) -> str | None:
    """The loss that a run is judged by: under a name that is known, as others need not fall.

    Example:
        >>> training_loss_key({"aux_loss": [], "train_loss_epoch": []}), training_loss_key({"aux_loss": []})
        ('train_loss_epoch', None)
    """
    return next((key for key in _LOSSES if key in series), None)


class Course(NamedTuple):
    """Where a noisy value began, how low it came, whether it rose from there for good, and whether it fell at all."""

    first: float
    """The median of the first five finite values, of a third of them in short runs; NaN where there is none."""
    lowest: float
    """The lowest level; a level is the median of some values in a row."""
    last: float
    noise: float
    """Standard error of a level."""
    rises_from: int | None
    """The step from which on it stays above its lowest level; None where it does not."""
    trend: str
    """``"falling"``; ``"flat"`` where a fall by a twentieth would have been seen; else ``"unclear"``."""


def course(points: Points) -> Course:
    """The levels of a loss, whether it has left the lowest of them for good, and whether it has fallen at all.

    Levels are medians of 20 values, in short runs of a fifth of them. A sustained rise is one of the last level and of
    the newest values over the lowest level, by more than 5 % of it, 10 % of what the loss had come down, and 8 standard
    errors; the noise is that around the lowest level or at the end, whichever is larger. What is not finite counts as
    infinitely high. It falls if its last level is more than 2.5 standard errors below the median of the first five
    values. If it does not, it is flat where it begins with the run, there are 100 values or more, and the noise is so
    small that a fall by 5 % would have been seen.

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
    width = max(2 if len(values) >= FEWEST else 1, min(_LEVEL, len(values) // 5))
    levels = _medians(values, width)
    at = int(np.argmin(levels))
    n_first = max(1, min(_FIRST, len(values) // 3))
    first = float(np.median([*values[np.isfinite(values)][:n_first]] or [np.nan]))
    lowest, last = float(levels[at]), float(levels[-1])
    deviation = max(_deviation(values[max(0, at + width - 2 * _LEVEL) : at + width]), scatter(values[-2 * width :]))
    noise = 1.25 * deviation / math.sqrt(width)
    if len(values) >= _JUDGED:  # neighbours may be alike, and levels wander more than their values tell
        known = levels[np.isfinite(levels)]
        noise = max(noise, _deviation(known[width:] - known[:-width]) / math.sqrt(2))
    limit = lowest + max(0.05 * abs(lowest), 0.1 * max(first - lowest, 0.0), 8 * noise)
    begin = _rise(values, levels, limit)
    rises_from = None if begin is None else int(steps[begin])
    deviation = scatter(values[-10 * width :])
    error = 1.25 * deviation * math.sqrt(1 / n_first + 1 / width)
    # A fall within the first values, which their median does not show, and values at the end that are not finite.
    hidden = max(values[:n_first]) > last + 3.5 * deviation + 0.05 * first or not math.isfinite(last)
    from_start = len(values) >= _JUDGED and steps[0] <= max(_NEAR_ZERO, 2 * (steps[1] - steps[0]))
    trend = "unclear"
    if first - last > 2.5 * error:
        trend = "falling"
    elif from_start and 2.5 * error <= 0.05 * first and lowest >= 0.9 * first and not hidden:
        trend = "flat"
    return Course(first, lowest, last, noise, rises_from, trend)


def usual(values: Sequence[float], window: int = 40) -> float:
    """The median of the last finite values; NaN if there are none.

    Example:
        >>> usual([1.0, 2.0, float("nan"), 3.0])
        2.0
    """
    finite = [value for value in values if np.isfinite(value)][-window:]
    return float(np.median(finite)) if finite else float("nan")


def _rise(values: NDArray[np.float64], levels: NDArray[np.float64], limit: float) -> int | None:
    """From which value on they are above the limit for good, if last level and newest values are."""
    width = len(values) - len(levels) + 1
    if width >= 2 and min(levels[-1], median_low(values[-max(2, width // 4) :])) > limit:
        # More than half of the values from the first of the high levels on are high; it rises behind the last that is
        # not, unless that is the last of all.
        calm = np.flatnonzero(levels <= limit)
        begin = int(calm[-1]) + 1 if len(calm) else 0
        low = np.flatnonzero(values[begin : begin + width] <= limit)
        begin += int(low[-1]) + 1 if len(low) else 0
        return begin if begin < len(values) else None
    if not np.isfinite(values[-1]):
        finite = np.flatnonzero(np.isfinite(values))
        return int(finite[-1]) + 1 if len(finite) else 0
    return None


def _deviation(values: NDArray[np.float64]) -> float:
    """The standard deviation of those that are finite, from their median absolute deviation."""
    finite = values[np.isfinite(values)]
    return _SIGMA * float(np.median(np.abs(finite - np.median(finite)))) if len(finite) else 0.0


def scatter(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The deviation around a level or a straight line, whichever is less: of what rises, the noise alone.

    Example:
        >>> scatter([1.0, 2.0, 3.0]) < 1e-9, scatter([1.0])
        (True, 0.0)
    """
    values = np.asarray(values, dtype=float)
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) < 3:
        return 0.0
    line = np.polyval(np.polyfit(finite, values[finite], 1), finite)
    return min(_deviation(values), _deviation(values[finite] - line))


def _medians(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Of ``width`` values in a row, (n) to (n - width + 1)."""
    with np.errstate(invalid="ignore"):
        medians: NDArray[np.float64] = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=-1)
    return np.where(np.isnan(medians), np.inf, medians)
