"""Healthy, recovered, at risk, not learning, diverging or stopped: the verdict on a run, and whose fault it was."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_callbacks.health.actions import ACTIONS, EPISODE, episodes_of, stopped, times, what_was_done
from lit_callbacks.health.events import without_undone
from lit_callbacks.health.loss import (
    at_risk,
    doubt,
    findings,
    healthy,
    how_it_diverges,
    not_back,
    why_not_learning,
)  # fmt: skip
from lit_callbacks.health.remarks import count, explain, said_before
from lit_callbacks.health.series import Points, Series, course, training_loss_key
from lit_callbacks.health.signs import Sign, first_signs, order
from lit_callbacks.health.unanswered import HORIZON, alarms_of, unanswered

_NEAR = 100
"""Steps before trouble in which a value out of line counts as its first sign: two measurements at the default cadence.

The longest that a value has been measured to lead the loss was 57 steps.
"""
_ADVICE = {
    "gradient": "What to do: lower the learning rate, warm up for longer, or clip with gradient_clip_val=1.0.",
    "vanishing": "What to do: warm up for longer, or take pre-LN; look at initialisation and what is detached.",
    "attention": "What to do: lower the learning rate, warm up for longer, or normalise queries and keys (qk_norm).",
    "residual": "What to do: lower the learning rate; look at initialisation and norm placement.",
    "neurons": "What to do: lower the learning rate, warm up for longer, or take GELU or SwiGLU in place of ReLU.",
    "learning": "What to do: look at learning rate and warm-up; with post-LN warm up; see that labels fit inputs.",
    "not_finite": "What to do: look at the module and the batch that are named; in fp16 take precision='bf16-mixed'.",
    "unplaced": "What to do: add NonFiniteAutopsy, which names module and batch; in fp16 take precision='bf16-mixed'.",
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
    is *at risk* when there was an alarm that nobody answered, unless it was of a gradient, early, only once and over;
    when most units of a layer are dead; when the few values of a loss have more than doubled; or when it has not come
    back from what was answered. Where the numbers do not tell, it is called healthy, without a clear trend.

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
        text = how_it_diverges(loss, judged[-1][1])
        return _trouble("diverging", text, loss.rises_from, series, events, done)
    found = findings(points, events)
    if reason := why_not_learning(whole, found, series, events):
        return _not_learning(reason, found, points, events, done)
    doubted = doubt(loss, judged) if loss else ""
    signs, passed = unanswered(series, events, actions, end, points)
    if signs or doubted:
        dead = bool(signs) and signs[0].kind == "neurons"
        what = "a layer is all but dead" if dead else "there was an alarm that nothing answered"
        return _about("at risk", at_risk(loss, key, doubted, what), signs, done)
    if episodes and loss is not None:
        # Of a level that was accepted nothing that was before counts.
        onset = max(begin, episodes[0][0]["step"])
        if (level := not_back(judged, onset, loss)) is not None:
            since = f"before step {onset}, where the first of {count(len(episodes), 'episode')} began"
            if begin:
                since = f"at step {begin}, when that was accepted"
            text = f"At risk: the loss ends at {loss.last:.4g}, and was {level:.4g} {since}."
            return _trouble("at risk", text, onset, series, events, done)
    if episodes:
        unknown = " as far as events tell; no training loss was logged."
        text = f"Recovered {times(len(episodes))}{unknown if loss is None else '; the loss went on as before.'}"
        return _trouble("recovered", text, episodes[0][0]["step"], series, events, done)
    return Diagnosis("healthy", "", None, (healthy(whole, key, passed), *passed))


def _not_learning(
    reason: str,
    found: Sequence[Mapping[str, Any]],
    points: Points,
    events: Sequence[Mapping[str, Any]],
    done: Sequence[str],
) -> Diagnosis:
    """With all alarms, as nothing shows that they have passed, and what was said of the recipe."""
    signs = first_signs({}, alarms_of(events), 0, events[-1]["step"] if events else 0, points)
    said = said_before(events, points[0][0] if points else 0)
    uniform = [event for event in events if event.get("alarm") == "attention_uniform"]
    warned = [event["step"] for event in (*found, *uniform)] + [step for step, _ in said] + [s.step for s in signs[:1]]
    told = [f"Said before the first step: {'; '.join(text for _, text in said)}."] if said else []
    sentences = (f"Not learning: {reason}.", *_seen(signs), *told, *done, _ADVICE["learning"])
    return Diagnosis("not learning", signs[0].where if signs else "", min(warned, default=None), sentences)


def _trouble(
    verdict: str, text: str, onset: int, series: Series, events: Sequence[Mapping[str, Any]], done: Sequence[str]
) -> Diagnosis:
    """Look for the first signs of what was there at ``onset``."""
    end, losses = onset + EPISODE, series.get(training_loss_key(series) or "", ())
    alarms = first_signs({}, events, onset - HORIZON, end, losses)
    signs = [*alarms, *first_signs(series, (), onset - _NEAR, end, losses)]
    placed = [sign for sign in signs if sign.where]
    if signs := placed or signs:
        return _about(verdict, text, sorted(signs, key=order), done)
    unseen = f"No layer was measured out of line in the {_NEAR} steps before step {onset}: measure more often."
    event = next((event for event in events if event["step"] == onset and event.get("event") in ACTIONS), None)
    if event:
        unseen = f"What was seen first: at step {onset}, {explain(event, series).seen}; in no layer that was measured."
    lost = any(onset <= step <= end and not math.isfinite(value) for step, value in losses)
    advice = [_ADVICE["unplaced"]] if lost or (event and event.get("rule") == "non_finite_loss") else []
    return Diagnosis(verdict, "", onset, (text, unseen, *done, *advice))


def _about(verdict: str, text: str, signs: Sequence[Sign], done: Sequence[str]) -> Diagnosis:
    if not signs:
        return Diagnosis(verdict, "", None, (text, *done))
    first = signs[0]
    return Diagnosis(verdict, first.where, first.step, (text, *_seen(signs), *done, _ADVICE[first.kind]))


def _seen(signs: Sequence[Sign]) -> tuple[str, ...]:
    """The first sign in a sentence, and where there were others; none where there are no signs."""
    if not signs:
        return ()
    first = signs[0]
    others = list(dict.fromkeys(sign.where for sign in signs[1:] if sign.where not in ("", first.where)))
    then = f" Then in {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}." if others else ""
    return (f"What was seen first: at step {first.step}{first.place}, {first.text}.{then}",)
