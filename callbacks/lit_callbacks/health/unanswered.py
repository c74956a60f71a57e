"""What nobody answered: alarms that stand, those that have passed, and layers that are dead."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_callbacks.health.actions import EPISODE
from lit_callbacks.health.series import Points, Series, usual
from lit_callbacks.health.signs import DEAD, Sign, first_signs, order

HORIZON = 500
"""Steps before trouble in which an alarm counts as its sign: how long LossSpikeRecovery remembers a rollback."""
_VANISHED = 1e-7  # a norm; times ten what GradientNormLogger takes a root mean square of elements to vanish at


def unanswered(
    series: Series, events: Sequence[Mapping[str, Any]], actions: Sequence[Mapping[str, Any]], end: int, losses: Points
) -> tuple[list[Sign], tuple[str, ...]]:
    """Alarms in whose 500 steps nothing was done, and layers that are dead at the end; and alarms that have passed."""
    alarms = [
        event for event in alarms_of(events)
        if not any(0 <= action["step"] - event["step"] <= HORIZON for action in actions)
    ]  # fmt: skip
    passed = [alarm for alarm in alarms if _has_passed(alarm, alarms, end, series)]
    signs = first_signs({}, [alarm for alarm in alarms if alarm not in passed], 0, end, losses)
    dead = {
        key: points
        for key, points in series.items()
        if key.startswith("dead_neurons/") and len(points) and points[-1][1] >= DEAD
    }
    once = [f"Only once, at step {s.step}{s.place}: {s.text}." for s in first_signs({}, passed, 0, end, losses)[:3]]
    return sorted([*signs, *first_signs(dead, (), 0, end)], key=order), tuple(once)


def alarms_of(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All but attention that is uniform, which is how training begins."""
    return [e for e in events if e.get("event") == "alarm" and e.get("alarm") != "attention_uniform"]


def _has_passed(alarm: Mapping[str, Any], alarms: Sequence[Mapping[str, Any]], end: int, series: Series) -> bool:
    """Whether it was of a gradient, never came again, and is not of the last tenth; attention stays as it is.

    An alarm is given once, when a state begins: a gradient that has vanished must also be seen to have come back.
    """
    kind, step = str(alarm.get("alarm")), alarm["step"]
    again = any(other.get("alarm") == kind and abs(other["step"] - step) > EPISODE for other in alarms)
    if not kind.startswith("gradient") or again or step > 0.9 * end:
        return False
    where = alarm.get("where")
    return kind != "gradient_vanishing" or not isinstance(where, list) or not any(_is_gone(w, series) for w in where)


def _is_gone(layer: Any, series: Series) -> bool:
    """Whether the last gradients that were logged of a layer are still all but zero."""
    points = series.get(f"grad_norm/{layer}", ())
    return bool(len(points)) and not usual([value for _, value in points], 3) > _VANISHED
