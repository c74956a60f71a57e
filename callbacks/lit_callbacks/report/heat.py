"""A value for each layer and step, or layer and head, as a map from pale to dark: the darker, the worse."""

import math
from collections.abc import Sequence
from itertools import groupby, pairwise, takewhile
from typing import Literal

from lit_callbacks.report.chart import figure, key
from lit_callbacks.report.downsample import Grid
from lit_callbacks.report.markup import Markup, element
from lit_callbacks.report.svg import WIDTH, Axis, frame, short

BUCKETS = 160
_LEVELS = 9
_LEFT, _RIGHT, _TOP = 250, 70, 6
_ROW, _LOW_ROW, _MANY = 18, 9, 40
"""Heights of a row, where there are not many of them and where there are."""
_NOT_FINITE = "nf"


class Scale:
    """Values to levels.

    Args:
        low: The lowest; what is below has the first level.
        high: The highest.
        worst: Which end is dark.
        log: Whether levels are equal ratios.

    Example:
        >>> scale = Scale(0.0, 0.9, worst="low")
        >>> [scale.level(value) for value in (0.05, 0.89, float("inf"), float("nan"))]
        ['q8', 'q0', 'nf', '']
    """

    def __init__(self, low: float, high: float, worst: Literal["high", "low"], log: bool = False) -> None:
        self.log, self.worst = log, worst
        self.low, self.high = self._on(low), self._on(high)

    def level(self, value: float) -> str:
        """The class of a cell; empty where nothing was measured."""
        if not math.isfinite(value):
            return "" if math.isnan(value) else _NOT_FINITE
        share = (self._on(value) - self.low) / ((self.high - self.low) or 1.0)
        return self._name(min(max(int(share * _LEVELS), 0), _LEVELS - 1))

    def legend(self) -> list[Markup]:
        """A square for each level, with the number where it begins."""
        begins = [self.low + (self.high - self.low) * i / _LEVELS for i in range(_LEVELS)]
        named = [(self._name(i), short(float(f"{10**x if self.log else x:.2g}"))) for i, x in enumerate(begins)]
        entries = [*named, (_NOT_FINITE, "not finite")]
        return [key(Markup(f'<rect class="{kind}" width="14" height="14"/>'), name, 14, 14) for kind, name in entries]

    def _name(self, level: int) -> str:
        return f"q{level if self.worst == 'high' else _LEVELS - 1 - level}"

    def _on(self, value: float) -> float:
        return math.log10(max(value, 1e-30)) if self.log else value


def heat_map(
    title: str, grid: Grid, scale: Scale, reach: tuple[int, int] | None = None, columns: Sequence[str] = ()
) -> Markup:
    """A figure, with the last value of each row beside it.

    Args:
        title: Its caption.
        grid: Rows and cells.
        scale: What is pale and what is dark.
        reach: First and last step of the axis; those of the grid by default.
        columns: Names of the columns, where they are no steps.
    """
    row = _ROW if len(grid.names) <= _MANY else _LOW_ROW
    bottom = _TOP + row * len(grid.names)
    first, last = reach or (grid.edges[0], grid.edges[-1])
    x = Axis(first, max(last, grid.edges[-1]), _LEFT, WIDTH - _RIGHT)
    edges = [x.place(edge) for edge in grid.edges]
    drawing = [*_cells(grid, scale, edges, row), *_names(grid, row)]
    drawing += (
        _columns(columns, edges, bottom) if columns else [frame(x, None, bottom, begin=_LEFT, end=WIDTH - _RIGHT)]
    )
    data = {
        "rows": grid.names, "edges": grid.edges, "cells": [_plain(cells) for cells in grid.cells],
        "columns": list(columns), "top": _TOP, "row": row,
    }  # fmt: skip
    ends = (_LEFT, WIDTH - _RIGHT, first, max(last, grid.edges[-1]))
    return figure(title, "heat", scale.legend(), drawing, bottom + 40, ends, data)


def _cells(grid: Grid, scale: Scale, edges: Sequence[float], row: int) -> list[Markup]:
    """A path for each level; neighbours of one level are one rectangle."""
    shapes: dict[str, list[str]] = {}
    for i, cells in enumerate(grid.cells):
        begin = 0
        for level, same in groupby(cells, key=scale.level):
            end = begin + len(list(same))
            if level:
                width = edges[end] - edges[begin]
                shapes.setdefault(level, []).append(
                    f"M{edges[begin]:.1f} {_TOP + i * row}h{width:.1f}v{row}h-{width:.1f}z"
                )
            begin = end
    return [Markup(f'<path class="{level}" d="{"".join(parts)}"/>') for level, parts in sorted(shapes.items())]


def _names(grid: Grid, row: int) -> list[Markup]:
    every = math.ceil(12 / row)
    drawn = []
    for i, name in list(enumerate(short_names(grid.names)))[::every]:
        height = f"{_TOP + row * i + row / 2 + 4:.1f}"
        full = element("title", grid.names[i])
        drawn.append(element("text", name, full, kind="row", x=_LEFT - 8, y=height, text_anchor="end"))
        known = [value for value in grid.cells[i] if not math.isnan(value)]
        drawn.append(element("text", short(known[-1]) if known else "", kind="row", x=WIDTH - _RIGHT + 6, y=height))
    return drawn


def _columns(names: Sequence[str], edges: Sequence[float], bottom: float) -> list[Markup]:
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    return [
        element("text", name, x=f"{place:.1f}", y=bottom + 16, text_anchor="middle")
        for place, name in zip(centres, names, strict=True)
    ]


def _plain(cells: Sequence[float]) -> list[float | str | None]:
    return [float(f"{v:.3g}") if math.isfinite(v) else None if math.isnan(v) else "not finite" for v in cells]


def short_names(names: Sequence[str], longest: int = 36) -> list[str]:
    """Names as they are; long ones without the end that all have in common, or else without their beginning.

    Example:
        >>> short_names(["model_blocks_0_attention_sublayer_dropout", "model_blocks_1_attention_sublayer_dropout"])
        ['model_blocks_0', 'model_blocks_1']
    """
    if len(names) > 1 and max(map(len, names)) > longest:
        parts = [name.split("_") for name in names]
        same = sum(1 for _ in takewhile(lambda ends: len(set(ends)) == 1, zip(*map(reversed, parts), strict=False)))
        names = ["_".join(part[: len(part) - same]) for part in parts]
    return [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
