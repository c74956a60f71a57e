"""Axes and text of a chart, as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lit_callbacks.report.markup import Markup

WIDTH = 1000
LEFT, RIGHT = 66, 16
"""Room for the numbers of the vertical axis, and at the right end."""


@dataclass(frozen=True)
class Axis:
    """Numbers to places.

    Args:
        low: Number at ``begin``.
        high: Number at ``end``.
        begin: Place, in units of the picture.
        end: Place; below ``begin`` for an axis that points up.
        log: Whether equal ratios have equal distances.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def place(self, number: float) -> float:
        """Where a number is.

        Example:
            >>> Axis(0, 10, 0, 100).place(5), Axis(1, 100, 100, 0, log=True).place(10)
            (50.0, 50.0)
        """
        low, high = self._on(self.low), self._on(self.high)
        share = (self._on(number) - low) / ((high - low) or 1.0)
        return self.begin + min(max(share, -0.02), 1.02) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers, three to eight of them.

        Example:
            >>> Axis(0, 97, 0, 1).ticks(), Axis(0.02, 3000, 0, 1, log=True).ticks()
            ([0, 20, 40, 60, 80], [0.1, 1.0, 10.0, 100.0, 1000.0])
        """
        if self.log and self.high / self.low >= 30:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            stride = max(1, math.ceil(len(powers) / 7))
            return [float(f"1e{power}") for power in powers[::stride]]
        size = 10 ** math.floor(math.log10((self.high - self.low) / 4 or 1.0))
        step = next(size * n for n in (1, 2, 5, 10) if (self.high - self.low) / (size * n) <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _on(self, number: float) -> float:
        return math.log10(max(number, 1e-30)) if self.log else number


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span more than a factor of 30, which is shown in logarithms."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > 30 * min(positive)


def number_axis(values: Sequence[float], begin: float, end: float, log: bool | None = None) -> Axis:
    """An axis on which all finite values have room.

    Args:
        values: Those to be drawn.
        begin: Where it begins.
        end: Where it ends.
        log: Whether it is logarithmic; by default where positive values span more than a factor of 30.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if log is None:
        log = low > 0 and is_wide(known)
    if log:
        positive = [value for value in known if value > 0] or [1.0]
        low, high = max(min(positive), 1e-12), max(positive)
        return Axis(low / 1.15, max(high, low * 1.01) * 1.15, begin, end, log=True)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low if low == 0 else low - room, high + room, begin, end)


def frame(x: Axis, y: Axis | None, bottom: float, begin: float = LEFT, end: float = WIDTH - RIGHT) -> Markup:
    """Grid and numbers of both axes, the horizontal one at ``bottom``, which counts optimizer steps."""
    parts = []
    for tick in y.ticks() if y else ():
        place = y.place(tick) if y else 0.0
        parts.append(f'<line class="grid" x1="{begin}" x2="{end}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{begin - 8}" y="{place + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks():
        place = x.place(tick)
        parts.append(f'<line class="tick" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom:.1f}" y2="{bottom + 5:.1f}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{begin}" x2="{end}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    parts.append(f'<text x="{end}" y="{bottom + 34:.1f}" text-anchor="end">optimizer steps</text>')
    return Markup("".join(parts))


def path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """A line through points, as the ``d`` of a path.

    Example:
        >>> path([0, 10], [5.04, 6])
        'M0 5L10 6'
    """
    return "M" + "L".join(f"{_coordinate(x)} {_coordinate(y)}" for x, y in zip(xs, ys, strict=True)) if len(xs) else ""


def short(number: float) -> str:
    """A number as a person writes it.

    Example:
        >>> [short(number) for number in (0.0, 1200.0, 150000.0, 0.0003, 2.5, 1e-9, 3e6, float("inf"))]
        ['0', '1200', '150k', '0.0003', '2.5', '1e-9', '3M', 'not finite']
    """
    if not math.isfinite(number):
        return "not finite"
    size = abs(number)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and (unit > 1e3 or size >= 1e4):
            return f"{number / unit:.4g}{letter}"
    if 0 < size < 1e-4:
        return f"{number:.3g}".replace("e-0", "e-")
    return f"{number:.4g}"


def _coordinate(value: float) -> str:
    text = f"{value:.1f}"
    return text.removesuffix(".0")
