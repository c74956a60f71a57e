"""Lines over the steps of one or more runs, with the events of a run marked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_callbacks.health import Points
from lit_callbacks.report.chart import figure, key
from lit_callbacks.report.downsample import Envelope, envelope
from lit_callbacks.report.markup import Markup, element
from lit_callbacks.report.svg import LEFT, RIGHT, WIDTH, Axis, frame, number_axis, path

BUCKETS = 600
_TOP, _BOTTOM = 10, 230
_MARK_ROW = 24
_FEW = 30  # points, which get a dot each
_TOGETHER = 4  # width in which marks are one

_SHAPES = {
    "skip": "M-5 -5L5 -5L0 5Z",
    "rollback": "M5 -6L-6 0L5 6Z",
    "stop": "M-5 -5L5 5M5 -5L-5 5",
    "accept": "M-6 0L-1 5L6 -5",
    "alarm": "M0 -6L6 0L0 6L-6 0Z",
    "autopsy": "M0 -6V6M-6 0H6",
}
"""One for each kind of event, so that no colour is needed; others are a dot."""
_DOT = "M-3 0A3 3 0 1 0 3 0A3 3 0 1 0 -3 0Z"


class Line(NamedTuple):
    """One line; ``style``, counted from 0, chooses colour and dashes, and a ``quiet`` one is thin."""

    name: str
    points: Points
    style: int = 0
    quiet: bool = False

    @property
    def kind(self) -> str:
        """Its class."""
        return f"s{self.style % 6} d{(self.style + self.style // 6) % 6}{' quiet' if self.quiet else ''}"


class Mark(NamedTuple):
    """An event below the axis, in a row; ``link`` is the id of what tells more, ``value`` its loss, where known."""

    step: int
    kind: str
    text: str
    link: str
    row: int = 0
    value: float | None = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    reach: tuple[int, int],
    marks: Sequence[Mark] = (),
    signs: Mapping[str, int] | None = None,
    log: bool | None = None,
) -> Markup:
    """A figure: medians as lines, and as a band what lies between the lowest and highest value of each bucket.

    Args:
        title: Its caption.
        lines: To be drawn; an empty one is left out.
        reach: First and last step of the axis.
        marks: Events, in a row below.
        signs: Steps to be marked by an upright line, by name.
        log: As for ``number_axis``.
    """
    shown = [(line, envelope(line.points, BUCKETS, reach)) for line in lines if len(line.points)]
    values = [value for _, found in shown for value in (*found.low, *found.high)]
    values += [mark.value for mark in marks if mark.value is not None]
    axis_at = _BOTTOM + _MARK_ROW * (1 + max((mark.row for mark in marks), default=-1))
    x = Axis(reach[0], max(reach[1], reach[0] + 1), LEFT, WIDTH - RIGHT)
    y = number_axis(values, _BOTTOM, _TOP, log)
    drawing = [frame(x, y, axis_at)]
    for line, found in shown:
        drawing += _line(line, found, x, y)
    for row, (name, step) in enumerate((signs or {}).items()):
        drawing += _sign(name, x.place(step), _TOP + 14 + 16 * row)
    drawing += _marks(marks, x, y)
    drawing.append(Markup(f'<line class="cursor" y1="{_TOP}" y2="{_BOTTOM}"/>'))
    keys = [key(Markup(f'<path class="line {line.kind}" d="M0 5H34"/>'), line.name, 34, 10) for line, _ in shown]
    kinds = dict.fromkeys(mark.kind if mark.kind in _SHAPES else "other" for mark in marks)
    keys += [key(_shape(kind), kind, 16, 16, "-8 -8 16 16") for kind in kinds]
    ends = (LEFT, WIDTH - RIGHT, reach[0], max(reach[1], reach[0] + 1))
    return figure(title, "lines", keys, drawing, axis_at + 40, ends, [_data(line, found) for line, found in shown])


def _line(line: Line, found: Envelope, x: Axis, y: Axis) -> list[Markup]:
    xs = [x.place(step) for step in found.steps]
    middle = [y.place(value) for value in found.middle]
    drawn = []
    if found.is_thinned:
        upper, lower = ([y.place(value) for value in side] for side in (found.high, found.low))
        drawn.append(Markup(f'<path class="band {line.kind}" d="{path([*xs, *xs[::-1]], [*upper, *lower[::-1]])}Z"/>'))
    drawn.append(Markup(f'<path class="line {line.kind}" d="{path(xs, middle)}"/>'))
    if len(xs) <= _FEW:
        places = zip(xs, middle, strict=True)
        drawn += [Markup(f'<circle class="dot {line.kind}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>') for a, b in places]
    if found.not_finite:
        crosses = "".join(f"M{x.place(step) - 3:.1f} {_TOP}l6 6m0 -6l-6 6" for step in found.not_finite)
        drawn.append(Markup(f'<path class="lost" d="{crosses}"><title>not finite</title></path>'))
    return drawn


def _data(line: Line, found: Envelope) -> dict[str, Any]:
    data = {"name": line.name, "x": found.steps, "y": _rounded(found.middle)}
    return data | ({"low": _rounded(found.low), "high": _rounded(found.high)} if found.is_thinned else {})


def _sign(name: str, place: float, height: float) -> list[Markup]:
    anchor, shift = ("start", 5) if place < WIDTH * 0.7 else ("end", -5)
    upright = Markup(f'<line class="sign" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
    return [upright, element("text", name, kind="signed", x=f"{place + shift:.1f}", y=height, text_anchor=anchor)]


def _marks(marks: Sequence[Mark], x: Axis, y: Axis) -> list[Markup]:
    """One for each kind and place, and a ring where its loss was.

    Those that would lie on top of each other are one, which says how many it is.
    """
    places: dict[tuple[int, str, int], list[Mark]] = {}
    for mark in marks:
        places.setdefault((round(x.place(mark.step) / _TOGETHER), mark.kind, mark.row), []).append(mark)
    drawn = []
    for (_, kind, row), same in places.items():
        first = same[0]
        text = f"{len(same)} times from step {first.step} to {same[-1].step}: " if len(same) > 1 else ""
        height = _BOTTOM + 14 + _MARK_ROW * row
        stem = Markup(f'<line class="stem" y1="{_TOP - height}" y2="-8"/>') if kind in _SHAPES else None
        place = f"translate({x.place(first.step):.1f} {height})"
        shape = element(
            "g", element("title", text + first.text), stem, _shape(kind),
            data_step=first.step, data_kind=kind, data_count=len(same), transform=place,
        )  # fmt: skip
        drawn.append(element("a", shape, href=f"#{first.link}"))
        if known := [mark.value for mark in same if mark.value is not None]:
            drawn.append(
                Markup(f'<circle class="ring" cx="{x.place(first.step):.1f}" cy="{y.place(max(known)):.1f}" r="4"/>')
            )
    return drawn


def _shape(kind: str) -> Markup:
    return element("path", kind=f"event {kind}", d=_SHAPES.get(kind, _DOT))


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
