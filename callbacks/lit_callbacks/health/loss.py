"""What the loss says of a run, in words: it diverges, it has not come back, it is in doubt, nothing is learned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_callbacks.health.series import FEWEST, Course, Points, Series, course, scatter, usual

_ENOUGH = 10  # values of the loss after a finding, which may refute it
_FEW = 20  # values: one level of a long run
_NEWEST = 5  # values, a quarter of a level
_UNIFORM = 0.99  # as for AttentionEntropyMonitor


def how_it_diverges(loss: Course, last: float) -> str:
    """The verdict on a loss that has left its lowest level for good, whose last value is ``last``."""
    ended = f"{loss.last:.4g}" if math.isfinite(last) and math.isfinite(loss.last) else "a value that is not finite"
    lowest = f"had come down to {loss.lowest:.4g}" if math.isfinite(loss.lowest) else "had no level that was finite"
    return f"Diverging since step {loss.rises_from}: the loss {lowest} and ends at {ended}."


def doubt(loss: Course, points: Points) -> str:
    """Why a loss that does not rise for good is not well either; empty where there is no reason.

    A few values do not tell noise from a rise. Those of the second half that are all above all of the first, and twice
    as high, do.
    """
    if not math.isfinite(loss.last):
        return "most of its last values are not finite"
    values = [value for _, value in points if math.isfinite(value)]
    if len(points) < FEWEST:
        risen = loss.last - loss.first > max(abs(loss.first), 8 * loss.noise)
    else:
        half = len(values) // 2
        risen = loss.last - loss.first > abs(loss.first) and min(values[half:]) > max(values[:half])
    few = ", in too few values to say more" if len(points) < _FEW else ""
    return f"ends at {loss.last:.4g}{few}" if risen else ""


def not_back(points: Points, step: int, loss: Course) -> float | None:
    """The level before a step near which, or below, the loss does not end; None where it does.

    Near is a tenth of that level or of the fall to it, or the noise, of which half the level is believed. Where no
    level is known, it is that at which the loss began.
    """
    before = [value for at, value in points if at < step and math.isfinite(value)][-_FEW:]
    level = usual(before) if before else loss.first
    noise = scatter(before if len(before) >= FEWEST else [v for _, v in points if math.isfinite(v)][-_FEW:])
    near = max(0.1 * abs(level), 0.1 * (loss.first - level), min(3 * noise, 0.5 * abs(level)))
    newest = usual([value for _, value in points], _NEWEST)  # a burst that is over is in the last level still
    return level if min(loss.last, newest) > level + near else None


def findings(points: Points, events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """That nothing is learned, as long as the loss has not fallen since."""

    def has_fallen(step: int) -> bool:
        since = [point for point in points if point[0] > step]
        before = [point for point in points if point[0] <= step]
        return len(since) >= _ENOUGH and course([*before[-FEWEST:], *since]).trend == "falling"

    found = [event for event in events if event.get("event") == "recipe" and event.get("id") == "not-learning"]
    return [event for event in found if not has_fallen(event["step"])]


def why_not_learning(
    loss: Course | None, found: Sequence[Mapping[str, Any]], series: Series, events: Sequence[Mapping[str, Any]]
) -> str:
    """By the loss, what an observer has found, or attention that stays uniform; empty where something is learned."""
    if loss is not None and loss.trend == "flat":
        return f"the loss began at {loss.first:.4g} and ends at {loss.last:.4g}"
    if found:
        return str(found[-1].get("text", "the loss is that of guessing by frequency")).rstrip(".")
    if any(event.get("alarm") == "attention_uniform" for event in events):
        entropies = [
            points[-1][1]
            for key, points in series.items()
            if key.startswith("attention_entropy/") and not key.endswith("/min") and len(points)
        ]
        if not entropies or sorted(entropies)[len(entropies) // 2] > _UNIFORM:
            return "attention looks at everything alike, so that nothing is learned from context"
    return ""


def healthy(loss: Course | None, key: str | None, passed: Sequence[str]) -> str:
    """The verdict on a run of which nothing bad is known."""
    if loss is None:
        return "Healthy as far as events tell; no training loss was logged."
    calm = "all is well at the end" if passed else "nothing was out of line"
    return f"Healthy: {_way(loss, key)}, and {calm}."


def at_risk(loss: Course | None, key: str | None, doubted: str, seen: str) -> str:
    """The verdict on a run whose loss is in doubt, or in which something was seen."""
    if loss is None:
        return f"At risk: no training loss was logged, and {seen}."
    if doubted:
        return f"At risk: {key} began at {loss.first:.4g}, and {doubted}."
    if loss.trend == "falling":
        return f"At risk: the loss is well so far, but {seen}."
    return f"At risk: {_way(loss, key)}, and {seen}."


def _way(loss: Course, key: str | None) -> str:
    trend = ", which is no clear trend" if loss.trend == "unclear" else ""
    return f"{key} went from {loss.first:.4g} to {loss.last:.4g}{trend}"
