"""The report as a picture, for a page of documentation or a message: loss and events, gradients, attention."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_callbacks.health import loss_key
from lit_callbacks.report.downsample import envelope
from lit_callbacks.report.heat import short_names
from lit_callbacks.report.panels import HEAT_PANELS, layer_grid, loss_of, scale_of
from lit_callbacks.report.run import Run
from lit_callbacks.report.svg import is_wide

_COLOURS = ("#2f66b3", "#c2571a", "#1b7f5c", "#8a3ea8")
_DASHES = ("-", "--", ":", "-.")
_MARKS = {"skip": "v", "rollback": "<", "stop": "x", "accept": "P", "alarm": "D"}


def draw(runs: Sequence[Run], path: Path, dpi: int = 90) -> None:
    """Write a PNG: the verdict, the loss of all runs, and maps of the first one's layers.

    Args:
        runs: At least one.
        path: Where to; its suffix chooses the format.
        dpi: Dots per inch of 9 inches.

    Cost: about a second; needs matplotlib.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    maps = [(panel, found) for panel in HEAT_PANELS if (found := layer_grid(runs[0], panel)).names]
    heights = [2.6, *(max(0.6, min(2.2, 0.16 * len(found.names))) for _, found in maps)]
    sentences = runs[0].diagnosis().sentences
    text = "\n".join(textwrap.fill(sentence, 116) for sentence in sentences)
    head = 0.25 + 0.19 * (text.count("\n") + 1)
    figure = Figure(figsize=(9, head + sum(height + 0.62 for height in heights)), dpi=dpi, layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(f"{runs[0].name}\n{text}", fontsize=9, ha="left", x=0.01, parse_math=False)
    reach = (0, max(1, *(run.last_step for run in runs)))
    for i, run in enumerate(runs):
        _draw_loss(axes[0], run, i, len(runs) > 1)
    axes[0].set(xlim=reach, title="Loss, and what happened over optimizer steps")
    legend = axes[0].legend(fontsize=7, frameon=False, ncols=4, loc="upper right")
    for entry in legend.get_texts():
        entry.set_parse_math(False)  # a name may hold a $
    for axis, (panel, found) in zip(axes[1:], maps, strict=True):
        cells = np.ma.masked_invalid(np.array(found.cells))
        low, high, log = scale_of(panel, found)
        norm = (LogNorm if log else Normalize)(low, high, clip=True)
        colours = "Blues" if panel.worst == "high" else "Blues_r"
        edges, rows = np.array(found.edges), np.arange(len(found.names) + 1)
        shown = axis.pcolormesh(edges, rows, cells, cmap=colours, norm=norm)
        axis.set(title=panel.title, xlim=reach, ylim=(len(found.names), 0))
        stride = max(1, len(found.names) // 14)
        places, names = np.arange(len(found.names))[::stride] + 0.5, short_names(found.names)[::stride]
        axis.set_yticks(places, names, fontsize=6, parse_math=False)
        figure.colorbar(shown, ax=axis, pad=0.01, aspect=8)
    for axis in axes:
        axis.title.set(fontsize=9)
        axis.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_loss(axis: Any, run: Run, i: int, named: bool) -> None:
    key = loss_key(run.series)
    if key is None:
        return
    found = envelope(run.series[key], 600)
    colour, dash = _COLOURS[i % 4], _DASHES[i % 4]
    axis.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.25, linewidth=0)
    name = f"{run.name}: {key}" if named else key
    axis.plot(found.steps, found.middle, dash, color=colour, linewidth=1.2, label=name)
    if found.low and min(found.low) > 0 and is_wide([*found.low, *found.high]):
        axis.set_yscale("log")
    if bad := [event for event in run.events if loss_of(event) is not None]:
        steps, losses = [event["step"] for event in bad], [loss_of(event) for event in bad]
        axis.plot(steps, losses, "o", color="black", fillstyle="none", markersize=4, label="of a bad step")
    for kind, mark in _MARKS.items():
        if steps := [event["step"] for event in run.events if event.get("event") == kind]:
            axis.plot(
                steps, [0.04] * len(steps), mark, color="black", markersize=4, linestyle="none", label=kind,
                transform=axis.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    first = run.diagnosis().first_warning_step
    if first is not None:
        axis.axvline(first, color="#b3261e", linestyle="--", linewidth=1.0, label=f"first sign: step {first}")
