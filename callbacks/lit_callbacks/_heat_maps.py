"""Hundreds of per-layer values as three pictures: layer x head, and layer x time."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lit_callbacks._curve import Curve

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_HEAD = re.compile(r"attention_entropy/(.+)_head_(\d+)")
_LAYER = re.compile(r"grad_norm/(layer_\d+)")
_UNITS = re.compile(r"dead_neurons/(?!window_tokens)(.+)")
_COLUMNS, _LABELS = 128, 24
_FEW = 0.1  # a share of dead units that is not to look like many


class HeatMap(NamedTuple):
    """A picture to be: a row for each layer, the first one at the top.

    Args:
        key: Its metric key.
        title: What the colours mean.
        rows: Names of the layers.
        columns: Heads, or steps.
        values: Shape ``(rows, columns)``; NaN where there is no value.
        across: What the columns are.
        limits: Lowest and highest value of the colours; None takes them from the values.
        log: Whether colours follow the logarithm.
    """

    key: str
    title: str
    rows: list[str]
    columns: list[int]
    values: "npt.NDArray[np.float64]"
    across: str
    limits: tuple[float, float] | None
    log: bool


def heat_maps(curves: Mapping[str, Curve], last: Mapping[str, float]) -> Iterator[HeatMap]:
    """Those that there are values for; over time, at two steps at least.

    Args:
        curves: Of each key of ``grad_norm/`` and ``dead_neurons/``, over the steps.
        last: Among others the last value of each ``attention_entropy/<layer>_head_<i>``.

    Example:
        >>> heads = {"attention_entropy/a_head_0": 0.5, "attention_entropy/a_head_1": 0.75}
        >>> (shown,) = heat_maps({}, heads)
        >>> shown.rows, shown.columns, shown.values.tolist()
        (['a'], [0, 1], [[0.5, 0.75]])
    """
    import numpy as np

    if found := {match.groups(): value for key, value in last.items() if (match := _HEAD.fullmatch(key))}:
        layers = list(dict.fromkeys(layer for layer, _ in found))
        numbers = sorted({int(head) for _, head in found})
        values = np.array([[found.get((layer, str(head)), np.nan) for head in numbers] for layer in layers])
        title = "attention entropy of each head: 0 looks at one key, 1 at all alike"
        yield HeatMap("heat_maps/attention_entropy", title, layers, numbers, values, "head", (0.0, 1.0), False)
    for key, title, pattern, log in (
        ("heat_maps/grad_norm", "gradient norm of each layer, before clipping", _LAYER, True),
        ("heat_maps/dead_neurons", "share of dead units in each layer", _UNITS, False),
    ):
        series = {match[1]: curve for name, curve in curves.items() if (match := pattern.fullmatch(name))}
        steps = sorted({step for curve in series.values() for step in curve.steps})
        if len(steps) > 1:
            steps = steps[:: -(-len(steps) // _COLUMNS)]
            by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in series.values()]
            values = np.array([[points.get(step, np.nan) for step in steps] for points in by_step])
            limits = None if log else (0.0, max([_FEW, *values[np.isfinite(values)]]))
            yield HeatMap(key, title, list(series), steps, values, "optimizer steps", limits, log)


def draw(shown: HeatMap) -> "Figure":
    """The picture. Values that are not finite, or none, are grey."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    masked = np.ma.masked_invalid(shown.values)
    if shown.log:
        masked = np.ma.masked_less_equal(masked, 0)
    low, high = shown.limits or ((masked.min(), masked.max()) if masked.count() else (1.0, 1.0))
    if not high > low:
        high = 2 * low if low else 1.0
    names = _without_common_part(shown.rows)
    left, height = 0.07 + 0.009 * max(map(len, names)), 1.0 + 0.22 * min(max(len(names), 6), 40)
    bottom, top = 0.55 / height, 1 - 0.35 / height  # inches: a layout engine would take longer than all the rest
    figure = Figure(figsize=(8.0, height), dpi=100)
    axes = figure.add_axes((left, bottom, 0.9 - left, top - bottom))
    axes.set_facecolor("#cccccc")
    norm = LogNorm(low, high) if shown.log else Normalize(low, high)
    image = axes.imshow(masked, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
    axes.set_title(shown.title, fontsize=10, loc="left")
    axes.set_xlabel(shown.across)
    axes.set_ylabel("layer")
    for set_ticks, labels, most in ((axes.set_xticks, shown.columns, 8), (axes.set_yticks, names, _LABELS)):
        places = range(0, len(labels), -(-len(labels) // most))
        set_ticks(places, labels=[str(labels[place]) for place in places])
    axes.tick_params(labelsize=8)
    figure.colorbar(image, cax=figure.add_axes((0.915, bottom, 0.02, top - bottom)))
    return figure


def _without_common_part(names: Sequence[str]) -> list[str]:
    """Long names say the same at either end."""
    if len(names) < 2:
        return [name[-32:] for name in names]
    parts = [name.split("_") for name in names]
    front = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    back = next((i for i, same in enumerate(zip(*(p[::-1] for p in parts), strict=False)) if len(set(same)) > 1), 0)
    return [
        "_".join(part[front : len(part) - back])[-32:] or name[-32:] for part, name in zip(parts, names, strict=True)
    ]
