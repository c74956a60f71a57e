"""What is drawn of a run: which keys, under which title, and who would have logged what is missing."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lit_callbacks.health import Points, Remark, explain, loss_key
from lit_callbacks.health.signs import first_signs, is_layer
from lit_callbacks.report._metrics import LARGEST
from lit_callbacks.report.downsample import Grid, grid
from lit_callbacks.report.heat import BUCKETS, Scale, heat_map
from lit_callbacks.report.lines import Line, Mark, line_chart
from lit_callbacks.report.run import Run
from lit_callbacks.report.svg import is_wide

Panel = tuple[str, str, str]
"""A title, who logs what is in it, and the figure; empty where that was not logged."""

_EXPLAINED = 100  # events whose layers are looked for
_RATE = re.compile(r"^(lr|learning_rate)($|[/-])")


class HeatPanel(NamedTuple):
    """A map of one value of all layers."""

    section: str
    title: str
    worst: Literal["high", "low"]
    log: bool
    limits: tuple[float, float] | None
    """Of the levels; without them those of the values, but a logarithmic one begins at ``pale`` at the least."""
    callback: str
    pale: float = 0.0


HEAT_PANELS = (
    HeatPanel("grad_norm/", "Gradient norm", "high", True, None, "GradientNormLogger"),
    HeatPanel("attention_entropy/", "Attention entropy", "low", False, (0.0, 1.0), "AttentionEntropyMonitor"),
    HeatPanel(
        "residual/kurtosis_", "Kurtosis of the residual stream", "high", True, None, "ActivationStatsMonitor", pale=1.0
    ),
    HeatPanel("dead_neurons/", "Share of dead units", "high", False, (0.0, 1.0), "DeadNeuronDetector"),
)

_LINES: tuple[tuple[str, str, tuple[str, ...], bool | None], ...] = (
    ("Gradient norm, before and after clipping", "GradientNormLogger", ("grad_norm/total", "grad_norm/clipped"), None),
    ("Learning rate, actual and planned", "LearningRateMonitor", (), False),
    ("Throughput: tokens a second", "ThroughputLogger", ("throughput/tokens_per_second",), False),
    ("Place in the data: tokens seen", "ThroughputLogger", ("throughput/total_tokens",), False),
    ("Steps skipped and undone", "LossSpikeRecovery", ("loss_spike/skipped_steps", "loss_spike/steps_lost"), False),
)
"""Title, who logs it, keys (none for learning rates, which have many names), and whether the axis is logarithmic."""


def remarks(run: Run) -> list[Remark]:
    """Every event, explained; of the first hundred actions also in which layer it was seen first."""
    told, asked = [], 0
    for event in run.events:
        where = ""
        if event.get("event") in ("skip", "rollback", "stop") and not event.get("parameter") and asked < _EXPLAINED:
            asked += 1
            signs = first_signs(run.series, (), event["step"] - 1, event["step"] + 1)
            where = signs[0].where if signs else ""
        told.append(explain(event, run.series, where))
    return told


def loss_panel(runs: Sequence[Run], told: Sequence[Sequence[Remark]], reach: tuple[int, int]) -> Panel:
    """Training and validation loss of all runs, with their events and the first sign of trouble."""
    lines, marks, signs = [], [], {}
    for i, (run, remarks_of_run) in enumerate(zip(runs, told, strict=True)):
        key = loss_key(run.series)
        keys = dict.fromkeys(name for name in (key, "val/loss", "val_loss") if name in run.series)
        lines += [Line(_called(run, runs, name), run.series[name], 2 * i + j) for j, name in enumerate(keys)]
        whose = "" if len(runs) == 1 else f"{run.name}, "
        marks += [
            Mark(remark.step, remark.kind, f"{whose}{remark}", f"event-{i}-{j}", i, loss_of(event))
            for j, (remark, event) in enumerate(zip(remarks_of_run, run.events, strict=True))
        ]
        first = run.diagnosis().first_warning_step
        if first is not None:
            signs[f"first sign{'' if len(runs) == 1 else ' in ' + run.name}: step {first}"] = first
    title = "Loss, and what happened"
    return title, "training_step's log", line_chart(title, lines, reach, marks, signs) if lines else ""


def line_panels(runs: Sequence[Run], reach: tuple[int, int]) -> Iterator[Panel]:
    """Lines over steps."""
    for title, callback, keys, log in _LINES:
        lines = _of_all(runs, keys) if keys else _rates(runs)
        yield title, callback, line_chart(title, lines, reach, log=log) if lines else ""


def layer_grid(run: Run, panel: HeatPanel) -> Grid:
    """The layers' values of a panel over steps."""
    rows = {name: points for name, points in layers(run.series, panel.section).items() if "_head_" not in name}
    return grid(rows, BUCKETS, "max" if panel.worst == "high" else "min")


def heat_panels(run: Run, reach: tuple[int, int]) -> Iterator[Panel]:
    """Maps of a run's layers."""
    for panel in HEAT_PANELS:
        found = layer_grid(run, panel)
        title = f"{panel.title}, layer by step"
        yield title, panel.callback, heat_map(title, found, _scale(panel, found), reach) if found.names else ""
        if panel.section == "attention_entropy/" and (heads := _heads(run.series)):
            count = max(map(len, heads.values()))
            cells = [[*row, *[math.nan] * (count - len(row))] for row in heads.values()]
            table, columns = Grid(list(heads), list(range(count + 1)), cells), [f"head {i}" for i in range(count)]
            title = "Attention entropy at the end, layer by head"
            yield title, panel.callback, heat_map(title, table, _scale(panel, table), columns=columns)


def _scale(panel: HeatPanel, found: Grid) -> Scale:
    low, high, log = scale_of(panel, found)
    return Scale(low, high, panel.worst, log)


def scale_of(panel: HeatPanel, found: Grid) -> tuple[float, float, bool]:
    """Lowest and highest level of a map, and whether the levels are logarithmic."""
    values = [value for cells in found.cells for value in cells if math.isfinite(value)] or [0.0]
    if panel.limits:
        return *panel.limits, False
    if not panel.log or not (panel.pale or is_wide(values)):
        return min(values), max(values), False
    low = max(panel.pale, min((value for value in values if value > 0), default=1.0))
    return low, max(*values, 10 * low), True


def layers(series: Mapping[str, Points], section: str) -> dict[str, Points]:
    """The layers' series of a section, in the order of their numbers.

    Example:
        >>> list(layers({"grad_norm/total": [], "grad_norm/layer_10": [], "grad_norm/layer_9": []}, "grad_norm/"))
        ['layer_9', 'layer_10']
    """
    found = {key.removeprefix(section): points for key, points in series.items() if key.startswith(section)}
    return dict(sorted(((n, p) for n, p in found.items() if is_layer(n)), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _heads(series: Mapping[str, Points]) -> dict[str, list[float]]:
    """The last entropy of each head, where they were logged."""
    table: dict[str, list[float]] = {}
    for name, points in layers(series, "attention_entropy/").items():
        layer, is_head, _ = name.rpartition("_head_")
        if is_head and len(points):
            table.setdefault(layer, []).append(points[-1][1])
    return table


def loss_of(event: Mapping[str, Any]) -> float | None:
    """The loss of the step that an event is about, if it has one that can be drawn."""
    value = event.get("loss")
    return value if isinstance(value, float) and abs(value) <= LARGEST else None


def _of_all(runs: Sequence[Run], keys: Sequence[str]) -> list[Line]:
    return [
        Line(_called(run, runs, key), run.series[key], 2 * i + j)
        for i, run in enumerate(runs)
        for j, key in enumerate(keys)
        if key in run.series
    ]


def _rates(runs: Sequence[Run]) -> list[Line]:
    """The highest rate of each run as it was logged, times what recovery made of it, and as it was planned."""
    lines = []
    for i, run in enumerate(runs):
        rates = {key: points for key, points in run.series.items() if _RATE.match(key)}
        if rates:
            key = max(rates, key=lambda name: max(value for _, value in rates[name]))
            actual = _lowered(rates[key], run.series.get("loss_spike/lr_factor", ()))
            lines.append(Line(_called(run, runs, f"{key}, actual"), actual, 2 * i))
            # What schedules log is what they planned; recovery may have lowered it.
            planned = run.planned or (rates[key] if actual != rates[key] else ())
            planned = [point for point in planned if point[0] <= run.last_step]
            lines.append(Line(_called(run, runs, "planned"), planned, 2 * i + 1, quiet=True))
    return lines


def _lowered(rate: Points, factor: Points) -> Points:
    """A schedule's rate times the factor of recovery, which is not in what schedules log."""
    known, factors, j = 1.0, list(factor), 0
    lowered = []
    for step, value in rate:
        while j < len(factors) and factors[j][0] <= step:
            known, j = factors[j][1], j + 1
        lowered.append((step, value * known))
    return lowered


def _called(run: Run, runs: Sequence[Run], key: str) -> str:
    return key if len(runs) == 1 else f"{run.name}: {key}"
