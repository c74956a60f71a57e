"""Healthy, recovered, at risk, not learning, diverging or stopped: the verdict on a run, and whose fault it was."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_callbacks.health.actions import ACTIONS, EPISODE, episodes_of, stopped, times, what_was_done
from lit_callbacks.health.events import without_undone
from lit_callbacks.health.remarks import explain
from lit_callbacks.health.series import FEWEST, Course, Points, Series, course, training_loss_key
from lit_callbacks.health.signs import DEAD, Sign, first_signs, order

_HORIZON, _NEAR = 500, 100
"""Steps before trouble in which an alarm, or else a value out of line, counts as its first sign.

The first is how long LossSpikeRecovery remembers a rollback. The second is two measurements at the default cadence; the
longest that a value has been measured to lead the loss was 57 steps.
"""
_ENOUGH = 10  # values of the loss after a finding, which may refute it
_UNIFORM = 0.99  # as for AttentionEntropyMonitor
_ADVICE = {
    "gradient": "What to do: lower the learning rate, warm up for longer, or clip with gradient_clip_val=1.0.",
    "attention": "What to do: lower the learning rate, warm up for longer, or normalise queries and keys (qk_norm).",
    "residual": "What to do: lower the learning rate; look at initialisation and norm placement.",
    "neurons": "What to do: lower the learning rate, warm up for longer, or take GELU or SwiGLU in place of ReLU.",
    "learning": "What to do: look at learning rate and warm-up; with post-LN warm up; see that labels fit inputs.",
    "not_finite": "What to do: look at the module and the batch that are named; in fp16 take precision='bf16-mixed'.",
}


@dataclass(frozen=True)
class Diagnosis:
    """What can be said of a run.

    Args:
        verdict: ``"no data"``, ``"healthy"``, ``"recovered"``, ``"at risk"``, ``"not learning"``, ``"diverging"`` or
            ``"stopped"``: the worst that is true.
        culprit: The layer, head or parameter in which it was seen first; empty if nothing was measured there.
        first_warning_step: When it was seen first; None where nothing was.
        sentences: The same in plain words: the verdict, what was seen first, what was done, what to do.
    """

    verdict: str
    culprit: str
    first_warning_step: int | None
    sentences: tuple[str, ...]


def diagnose(series: Series, events: Sequence[Mapping[str, Any]]) -> Diagnosis:
    """The verdict on a run.

    It *diverges* when the loss has left its lowest level for good, or is not finite at the end; it was *stopped* by
    recovery or a guard, it *recovered* from what they answered. It is *not learning* when the loss was flat all along
    and would have been seen to fall, or an observer has found that nothing is learned and it has not fallen since. It
    is *at risk* when there was an alarm that nobody answered, unless it was of a gradient, early and only once, or when
    most units of a layer are dead. Where the numbers do not tell, it is called healthy, without a clear trend.

    Args:
        series: ``(step, value)`` pairs, by step, under the keys of the callbacks' catalogue; missing ones are done
            without. The loss is ``train/loss`` or another name that is usual for it; no other loss is judged.
        events: Lines of ``events.jsonl``, as they were written or by step.

    Cost: 0.15 s for 100,000 values of the loss; the layers' values are looked at around the trouble only.

    Example:
        >>> loss = [(step, 2.0 + 2.0 / (1 + step)) for step in range(60)] + [(60 + i, 8.0) for i in range(30)]
        >>> norms = [(step, 40.0 if step >= 55 else 1.0) for step in range(0, 90, 5)]
        >>> found = diagnose({"train/loss": loss, "grad_norm/layer_3": norms, "grad_norm/layer_0": [(0, 1.0)]}, [])
        >>> found.verdict, found.culprit, found.first_warning_step
        ('diverging', 'layer_3', 55)
    """
    key = training_loss_key(series)
    points = series[key] if key else ()
    known = [event for event in without_undone(events) if isinstance(event.get("step"), int)]
    events = sorted(known, key=lambda event: event["step"])
    if not points and not events:
        unknown = "No training loss was logged under a name that is known, such as train/loss."
        text = unknown if any(map(len, series.values())) else "Nothing has been logged yet."
        return Diagnosis("no data", "", None, (text,))
    end = max([step for step, _ in points[-1:]] + [event["step"] for event in events[-1:]])
    # A level that was accepted as the new normal is where a rise is measured from; what was learnt before counts too.
    begin = max((event["step"] for event in events if event.get("event") == "accept"), default=0)
    judged = [point for point in points if point[0] >= begin] or points
    whole = course(points) if points else None
    loss = course(judged) if begin and judged else whole
    actions = [event for event in events if event.get("event") in ACTIONS]
    episodes = episodes_of(actions)
    done = what_was_done(actions, len(episodes))

    if (stop := stopped(events, end)) is not None:
        onset = next(e[0]["step"] for e in episodes if e[-1]["step"] >= stop)
        return _trouble("stopped", f"Stopped at step {stop}: going on did not help.", onset, series, events, done)
    if loss is not None and loss.rises_from is not None:
        return _trouble("diverging", _diverging(loss, judged[-1][1]), loss.rises_from, series, events, done)
    findings = _findings(points, events)
    if reason := _not_learning(whole, findings, series, events):
        warned = [e["step"] for e in (*findings, *events) if e in findings or e.get("alarm") == "attention_uniform"]
        text = f"Not learning: {reason}."
        return Diagnosis("not learning", "", min(warned, default=None), (text, *done, _ADVICE["learning"]))
    signs, passed = _unanswered(series, events, actions, end)
    if signs:
        what = "a layer is all but dead" if signs[0].kind == "neurons" else "there was an alarm that nothing answered"
        return _about("at risk", f"At risk: the loss is well so far, but {what}.", signs, done)
    if loss is not None and (doubt := _doubt(loss, len(judged))):
        return Diagnosis("at risk", "", None, (f"At risk: {key} began at {loss.first:.4g}, and {doubt}.", *done))
    if episodes:
        text = f"Recovered {times(len(episodes))}; the loss went on as before."
        return _trouble("recovered", text, episodes[0][0]["step"], series, events, done)
    return Diagnosis("healthy", "", None, (_healthy(whole, key, passed), *passed))


def _trouble(
    verdict: str, text: str, onset: int, series: Series, events: Sequence[Mapping[str, Any]], done: Sequence[str]
) -> Diagnosis:
    """Look for the first signs of what was there at ``onset``."""
    end = onset + EPISODE
    signs = [*first_signs({}, events, onset - _HORIZON, end), *first_signs(series, (), onset - _NEAR, end)]
    if signs:
        return _about(verdict, text, sorted(signs, key=order), done)
    unseen = f"No layer was measured out of line in the {_NEAR} steps before step {onset}: measure more often."
    if event := next((event for event in events if event["step"] == onset and event.get("event") in ACTIONS), None):
        unseen = f"What was seen first: at step {onset}, {explain(event, series).seen}; in no layer that was measured."
    return Diagnosis(verdict, "", onset, (text, unseen, *done))


def _about(verdict: str, text: str, signs: Sequence[Sign], done: Sequence[str]) -> Diagnosis:
    first = signs[0]
    others = list(dict.fromkeys(sign.where for sign in signs[1:] if sign.where != first.where))
    then = f" Then in {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}." if others else ""
    seen = f"What was seen first: at step {first.step}, in {first.where}, {first.text}.{then}"
    return Diagnosis(verdict, first.where, first.step, (text, seen, *done, _ADVICE[first.kind]))


def _diverging(loss: Course, last: float) -> str:
    ended = f"{loss.last:.4g}" if math.isfinite(last) and math.isfinite(loss.last) else "a value that is not finite"
    lowest = f"had come down to {loss.lowest:.4g}" if math.isfinite(loss.lowest) else "had no level that was finite"
    return f"Diverging since step {loss.rises_from}: the loss {lowest} and ends at {ended}."


def _doubt(loss: Course, n: int) -> str:
    """Why a loss of ``n`` values that does not rise for good is not well either."""
    if not math.isfinite(loss.last):
        return "most of its last values are not finite"
    risen = n < FEWEST and loss.last - loss.first > max(abs(loss.first), 8 * loss.noise)
    return f"ends at {loss.last:.4g}, in too few values to say more" if risen else ""


def _findings(points: Points, events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """That nothing is learned, as long as the loss has not fallen since."""

    def has_fallen(step: int) -> bool:
        since = [point for point in points if point[0] > step]
        before = [point for point in points if point[0] <= step]
        return len(since) >= _ENOUGH and course([*before[-FEWEST:], *since]).trend == "falling"

    found = [event for event in events if event.get("event") == "recipe" and event.get("id") == "not-learning"]
    return [event for event in found if not has_fallen(event["step"])]


def _not_learning(
    loss: Course | None, findings: Sequence[Mapping[str, Any]], series: Series, events: Sequence[Mapping[str, Any]]
) -> str:
    if loss is not None and loss.trend == "flat":
        return f"the loss began at {loss.first:.4g} and ends at {loss.last:.4g}"
    if findings:
        return str(findings[-1].get("text", "the loss is that of guessing by frequency")).rstrip(".")
    if any(event.get("alarm") == "attention_uniform" for event in events):
        entropies = [
            points[-1][1]
            for key, points in series.items()
            if key.startswith("attention_entropy/") and not key.endswith("/min") and len(points)
        ]
        if not entropies or sorted(entropies)[len(entropies) // 2] > _UNIFORM:
            return "attention looks at everything alike, so that nothing is learned from context"
    return ""


def _unanswered(
    series: Series, events: Sequence[Mapping[str, Any]], actions: Sequence[Mapping[str, Any]], end: int
) -> tuple[list[Sign], tuple[str, ...]]:
    """Alarms in whose 500 steps nothing was done, and layers that are dead at the end; and alarms that have passed."""
    alarms = [
        event for event in events
        if event.get("event") == "alarm" and event.get("alarm") != "attention_uniform"
        and not any(0 <= action["step"] - event["step"] <= _HORIZON for action in actions)
    ]  # fmt: skip
    passed = [alarm for alarm in alarms if _has_passed(alarm, alarms, end)]
    signs = first_signs({}, [alarm for alarm in alarms if alarm not in passed], 0, end)
    dead = {
        key: points
        for key, points in series.items()
        if key.startswith("dead_neurons/") and len(points) and points[-1][1] >= DEAD
    }
    once = [f"Only once, at step {s.step}, in {s.where}: {s.text}." for s in first_signs({}, passed, 0, end)[:3]]
    return sorted([*signs, *first_signs(dead, (), 0, end)], key=order), tuple(once)


def _has_passed(alarm: Mapping[str, Any], alarms: Sequence[Mapping[str, Any]], end: int) -> bool:
    """Whether it was of a gradient, never came again, and is not of the last tenth; attention stays as it is."""
    kind, step = str(alarm.get("alarm")), alarm["step"]
    again = any(other.get("alarm") == kind and abs(other["step"] - step) > EPISODE for other in alarms)
    return kind.startswith("gradient") and not again and step <= 0.9 * end


def _healthy(loss: Course | None, key: str | None, passed: Sequence[str]) -> str:
    if loss is None:
        return "Healthy as far as events tell; no training loss was logged."
    trend = ", which is no clear trend" if loss.trend == "unclear" else ""
    calm = "all is well at the end" if passed else "nothing was out of line"
    return f"Healthy: {key} went from {loss.first:.4g} to {loss.last:.4g}{trend}, and {calm}."
