"""A value over the steps of a run in a bounded number of points: all of late, and before that the worst ones."""

import math
from collections.abc import Sequence
from typing import Any, Literal


class Trace:
    """Points (step, value): the last as they came, and older ones as one for each of at most ``most`` stretches.

    Args:
        keep: Which point of a stretch is kept: one whose value says when trouble began is its highest or lowest (one
            that is not finite comes before all others); a level must not be raised by that: it has the first.
        most: Stretches; when there are more, two become one.
        steps: Of the older points.
        values: Of the older points.
        stride: Points that a stretch has had.
        offered: Points that have become old.
        recent: The last ones.
        late: How many those are.

    Example:
        >>> trace = Trace("high", most=2)
        >>> for step in range(208):
        ...     trace.add(step, 9.0 if step == 5 else 0.1 * step)
        >>> trace.points[:3]
        [(3, 0.30000000000000004), (5, 9.0), (8, 0.8)]
    """

    def __init__(
        self,
        keep: Literal["first", "high", "low"] = "first",
        most: int = 128,
        steps: Sequence[int] = (),
        values: Sequence[float] = (),
        stride: int = 1,
        offered: int = 0,
        recent: Sequence[Sequence[float]] = (),
        late: int = 200,
    ) -> None:
        self.keep, self.most, self.late = keep, most, late
        self.steps, self.values = list(steps), list(values)
        self.stride, self.offered = stride, offered
        self.recent = [(int(step), value) for step, value in recent]

    @property
    def points(self) -> list[tuple[int, float]]:
        """All of them, by step."""
        return [*zip(self.steps, self.values, strict=True), *self.recent]

    def add(self, step: int, value: float) -> None:
        """Take a point; the oldest of the last ones becomes part of a stretch."""
        self.recent.append((step, value))
        if len(self.recent) <= self.late:
            return
        old_step, old = self.recent.pop(0)
        if self.offered % self.stride == 0:
            self.steps.append(old_step)
            self.values.append(old)
        elif self._badness(old) > self._badness(self.values[-1]):
            self.steps[-1], self.values[-1] = old_step, old
        self.offered += 1
        if len(self.steps) > self.most:
            pairs = [range(i, min(i + 2, len(self.steps))) for i in range(0, len(self.steps), 2)]
            kept = [max(pair, key=lambda i: self._badness(self.values[i])) for pair in pairs]
            self.steps, self.values = [self.steps[i] for i in kept], [self.values[i] for i in kept]
            self.stride *= 2

    def _badness(self, value: float) -> float:
        if self.keep == "first":
            return 0.0
        return math.inf if not math.isfinite(value) else value if self.keep == "high" else -value

    def cut(self, step: int) -> None:
        """Drop the points at ``step`` and beyond; with none left, begin anew."""
        self.recent = [point for point in self.recent if point[0] < step]
        kept = sum(s < step for s in self.steps)
        del self.steps[kept:], self.values[kept:]
        if not kept:
            self.stride, self.offered = 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain types."""
        lists = {"steps": list(self.steps), "values": list(self.values), "recent": list(map(list, self.recent))}
        return {**vars(self), **lists}
