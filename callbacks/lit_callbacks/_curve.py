"""A value over the steps of a run, in a bounded number of points."""

from typing import Any


class Curve:
    """Points (step, value), thinned out evenly so that there are never more than ``most``.

    Example:
        >>> curve = Curve(most=3)
        >>> for step in range(8):
        ...     curve.add(step, 0.5 * step)
        >>> curve.steps, curve.values
        ([0, 4], [0.0, 2.0])
    """

    def __init__(
        self,
        steps: list[int] | None = None,
        values: list[float] | None = None,
        stride: int = 1,
        offered: int = 0,
        most: int = 2000,
    ) -> None:
        self.steps = list(steps or [])
        self.values = list(values or [])
        self.stride = stride
        self.offered = offered
        self.most = most

    def add(self, step: int, value: float) -> None:
        """Take every ``stride``-th point offered."""
        if self.offered % self.stride == 0:
            self.steps.append(step)
            self.values.append(value)
        self.offered += 1
        if len(self.steps) > self.most:
            del self.steps[1::2], self.values[1::2]
            self.stride *= 2

    def cut(self, step: int) -> None:
        """Drop the points at ``step`` and beyond; with none left, begin anew."""
        kept = sum(s < step for s in self.steps)
        del self.steps[kept:], self.values[kept:]
        if not kept:
            self.stride, self.offered = 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain types."""
        return {**vars(self), "steps": list(self.steps), "values": list(self.values)}
