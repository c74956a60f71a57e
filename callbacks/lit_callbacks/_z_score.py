"""How far is a value above what is usual, and how much of it is left: the statistics of ZClip."""

import math
from typing import Any

EPSILON = 1e-6
"""Added to what is divided by, here and where a norm is clipped; ZClip's."""


class ZScoreThreshold:
    r"""Mean and variance of a series as exponential moving averages, and what they make of its next value.

    The z-score of :math:`x` is :math:`z = (x - \mu) / (\sigma + 10^{-6})`. A value with :math:`z` above the threshold
    :math:`z_0` is an outlier, of which :math:`\mu + \sigma z_0^2 / z` is left: the further out, the closer to the mean.
    The averages learn what is left. They start from the plain mean and variance of the first ``warmup_steps`` values,
    among which nothing is an outlier (Kumar et al. 2025, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*).

    What is left of outliers is close to the mean, so the variance shrinks, and a series that jumps and stays there
    would be out of line for ever. Here ``warmup_steps`` outliers in a row start a new warm-up: the only difference to
    the original on finite values, and one that healthy series do not come to.

    Args:
        alpha: Weight of the past in the averages.
        z_threshold: The z-score above which a value is an outlier.
        warmup_steps: Values to collect before anything is judged.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> series = ZScoreThreshold(warmup_steps=2)
        >>> series.update(1.0), series.update(3.0)  # mean 2, variance 1
        (None, None)
        >>> round(series.z_score(7.0), 3), round(series.threshold(7.0), 3)  # 2 + 1 * 2.5 * 2.5 / 5
        (5.0, 3.25)
    """

    def __init__(self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        if not z_threshold > 0:
            raise ValueError(f"z_threshold must be above 0, got {z_threshold}")
        if warmup_steps < 2:  # one value has no variance
            raise ValueError(f"warmup_steps must be at least 2, got {warmup_steps}")
        self.alpha = alpha
        self.z_threshold = z_threshold
        self.warmup_steps = warmup_steps
        self._first: list[float] = []
        self._mean = self._variance = 0.0
        self._in_a_row = 0

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return len(self._first) >= self.warmup_steps

    @property
    def limit(self) -> float:
        """The value at which outliers begin; infinite during the warm-up."""
        return self._mean + self.z_threshold * (math.sqrt(self._variance) + EPSILON) if self.ready else math.inf

    def z_score(self, value: float) -> float:
        """Standard deviations above the mean; 0 during the warm-up."""
        return (value - self._mean) / (math.sqrt(self._variance) + EPSILON) if self.ready else 0.0

    def threshold(self, value: float) -> float:
        """What is left of a value: all of it, unless it is an outlier."""
        z = self.z_score(value)
        if z > self.z_threshold:
            return self._mean + self.z_threshold * math.sqrt(self._variance) / (z / self.z_threshold)
        return value

    def update(self, value: float) -> None:
        """Learn what is left of a value; nothing is learnt from one that is not finite."""
        if not math.isfinite(value):
            return
        self._in_a_row = self._in_a_row + 1 if self.z_score(value) > self.z_threshold else 0
        if self._in_a_row >= self.warmup_steps:
            self._first, self._in_a_row = [], 0
        if not self.ready:
            self._first.append(value)
            self._mean = sum(self._first) / len(self._first)
            self._variance = sum((x - self._mean) ** 2 for x in self._first) / len(self._first)
            return
        left = self.threshold(value)
        self._mean = self.alpha * self._mean + (1 - self.alpha) * left
        self._variance = self.alpha * self._variance + (1 - self.alpha) * (left - self._mean) ** 2

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the values of the warm-up."""
        averages = {"mean": self._mean, "variance": self._variance}
        return {"first": list(self._first), "in_a_row": self._in_a_row, **averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on judging."""
        self._first = list(state_dict["first"])
        self._in_a_row = state_dict["in_a_row"]
        self._mean, self._variance = state_dict["mean"], state_dict["variance"]
