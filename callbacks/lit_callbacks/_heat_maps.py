"""Hundreds of per-layer values as three pictures: layer x head, and layer x time."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lit_callbacks.health import Series
from lit_callbacks.report.downsample import grid
from lit_callbacks.report.heat import short_names
from lit_callbacks.report.panels import layers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_UNITS = re.compile(r"dead_neurons/(?!window_tokens)(.+)")
_HEAD = re.compile(r"attention_entropy/(.+)_head_(\d+)")
_COLUMNS, _LABELS = 128, 24
_STEPS = "optimizer steps"
_FEW = 0.1  # a share of dead units that is not to look like many


class HeatMap(NamedTuple):
    """A picture to be: a row for each layer, the first one at the top.

    Args:
        key: Its metric key.
        title: What the colours mean.
        rows: Names of the layers.
        columns: Heads, or the first step of each column.
        values: Shape ``(rows, columns)``; NaN where there is no value.
        across: What the columns are.
        limits: Lowest and highest value of the colours; None takes them from the values.
        log: Whether colours follow the logarithm.
        low_is_dark: Whether low values are the bad ones.
    """

    key: str
    title: str
    rows: list[str]
    columns: list[int]
    values: "npt.NDArray[np.float64]"
    across: str
    limits: tuple[float, float] | None
    log: bool
    low_is_dark: bool = False


def heat_maps(series: Series, last: Mapping[str, float]) -> Iterator[HeatMap]:
    """Those that there are values for; over time, at two steps at least.

    Args:
        series: Of each key of ``grad_norm/`` and ``dead_neurons/`` among others, over the steps.
        last: Among others the last value of each ``attention_entropy/<layer>_head_<i>``.

    Example:
        >>> heads = {"attention_entropy/a_head_0": 0.5, "attention_entropy/a_head_1": 0.75}
        >>> (shown,) = heat_maps({}, heads)
        >>> shown.rows, shown.columns, shown.values.tolist()
        (['a'], [0, 1], [[0.5, 0.75]])
    """
    import numpy as np

    if found := {match.groups(): value for key, value in last.items() if (match := _HEAD.fullmatch(key))}:
        names = list(dict.fromkeys(layer for layer, _ in found))
        numbers = sorted({int(head) for _, head in found})
        values = np.array([[found.get((layer, str(head)), np.nan) for head in numbers] for layer in names])
        title = "attention entropy of each head: 0 looks at one key, 1 at all alike"
        yield HeatMap("heat_maps/attention_entropy", title, names, numbers, values, "head", (0.0, 1.0), False, True)
    units = {match[1]: points for key, points in series.items() if (match := _UNITS.fullmatch(key))}
    for section, title, rows, log in (
        ("grad_norm", "gradient norm of each layer, before clipping", layers(series, "grad_norm/"), True),
        ("dead_neurons", "share of dead units in each layer", units, False),
    ):
        table = grid(rows, _COLUMNS, "max")
        if len(table.edges) > 2:
            values = np.array(table.cells)
            limits = None if log else (0.0, max([_FEW, *values[np.isfinite(values)]]))
            key = f"heat_maps/{section}"
            yield HeatMap(key, title, table.names, table.edges[:-1], values, _STEPS, limits, log)


def draw(shown: HeatMap) -> "Figure":
    """The picture, in the colours of the report: the darker, the worse. What is not finite, or missing, is grey."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    masked = np.ma.masked_invalid(shown.values)
    if shown.log:
        masked = np.ma.masked_less_equal(masked, 0)
    low, high = shown.limits or ((masked.min(), masked.max()) if masked.count() else (1.0, 1.0))
    if not high > low:
        high = 2 * low if low else 1.0
    names = short_names(shown.rows, 32)
    left, height = 0.07 + 0.009 * max(map(len, names)), 1.0 + 0.22 * min(max(len(names), 6), 40)
    bottom, top = 0.55 / height, 1 - 0.35 / height  # inches: a layout engine would take longer than all the rest
    figure = Figure(figsize=(8.0, height), dpi=100)
    axes = figure.add_axes((left, bottom, 0.9 - left, top - bottom))
    axes.set_facecolor("#bbbbbb")
    colours = "Blues_r" if shown.low_is_dark else "Blues"
    extent, ticks = None, [(axes.set_yticks, names, _LABELS)]
    if shown.across == _STEPS:
        first, last = shown.columns[0], shown.columns[-1]
        extent = (first, last + (last - first) / (len(shown.columns) - 1), len(names) - 0.5, -0.5)
    else:
        ticks.append((axes.set_xticks, [str(column) for column in shown.columns], 8))
    norm = LogNorm(low, high) if shown.log else Normalize(low, high)
    image = axes.imshow(masked, aspect="auto", interpolation="nearest", cmap=colours, norm=norm, extent=extent)
    axes.set_title(shown.title, fontsize=10, loc="left")
    axes.set_xlabel(shown.across)
    axes.set_ylabel("layer")
    for set_ticks, labels, most in ticks:
        places = range(0, len(labels), -(-len(labels) // most))
        set_ticks(places, labels=[labels[place] for place in places])
    axes.tick_params(labelsize=8)
    figure.colorbar(image, cax=figure.add_axes((0.915, bottom, 0.02, top - bottom)))
    return figure
