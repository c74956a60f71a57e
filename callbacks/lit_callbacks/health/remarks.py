"""An event of ``events.jsonl`` as a person would tell it: what was seen, what was done, what it cost."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_callbacks.health.series import Series, loss_key, usual
from lit_callbacks.health.signs import alarm_text

_RULES = {
    "loss": "the loss was out of line",
    "gradient_norm": "the gradient norm was out of line",
    "loss_and_gradient_norm": "loss and gradient norm were out of line",
    "loss_often": "the loss was high for the third time in five steps",
    "loss_has_risen": "the loss had risen and stayed there",
    "non_finite_loss": "the loss was not a finite number",
    "non_finite_gradient": "the gradient was not finite",
    "weights_or_optimizer_state_not_finite": "weights or optimizer state were not finite",
}


class Remark(NamedTuple):
    """One event, explained."""

    step: int
    kind: str
    seen: str
    done: str
    cost: str
    where: str = ""

    def __str__(self) -> str:
        seen = f"{self.seen}, first seen in {self.where}" if self.where else self.seen
        parts = [seen, self.done, f"cost {self.cost}" if self.cost else ""]
        return f"step {self.step}: {'; '.join(part for part in parts if part)}."


def explain(event: Mapping[str, Any], series: Series | None = None, where: str = "") -> Remark:
    """One event in plain words.

    Args:
        event: A line of ``events.jsonl``. Unknown kinds are told by their name and values.
        series: What was logged, to say how far from usual a number was.
        where: The layer in which it was seen first, if the event does not say so itself.

    Example:
        >>> norms = {"grad_norm/total": [(step, 0.5) for step in range(0, 1200, 50)]}
        >>> event = {"step": 1204, "event": "skip", "rule": "gradient_norm", "grad_norm": 18.5}
        >>> remark = explain(event, norms, where="layer_3")
        >>> print(f"{remark.seen}, in {remark.where}; {remark.done}; cost {remark.cost}")
        the gradient norm was 37 times its usual value, in layer_3; the step was not made; cost 1 step
    """
    kind, step = str(event.get("event", "event")), _step(event)
    if kind in ("skip", "rollback", "accept", "stop"):
        seen = _seen(event, series or {})
        done, cost = _done(kind, step, event)
        # With such a loss all gradients are not finite, and which parameter comes first says nothing.
        parameter = "" if event.get("rule") == "non_finite_loss" else str(event.get("parameter") or "")
        return Remark(step, kind, seen, done, cost, parameter or where)
    if kind == "alarm":
        found = event.get("where")
        names = [str(name) for name in found] if isinstance(found, list) else []
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        place = f"{names[0]}{more}" if names else ""
        return Remark(step, kind, alarm_text(str(event.get("alarm"))), "nothing was changed", "", place)
    if kind == "autopsy":
        return Remark(step, kind, str(event.get("text", "the first value that was not finite was looked for")), "", "")
    if kind == "recipe":
        return Remark(step, kind, f"{event.get('text', event.get('id'))}".rstrip("."), _advice(event), "")
    return Remark(step, kind, *_others(kind, event))


def said_before(events: Sequence[Mapping[str, Any]], begin: int) -> list[tuple[int, str]]:
    """Step and text of the errors and warnings on the recipe up to step ``begin``, each once, errors first.

    Example:
        >>> found = {"step": 0, "event": "recipe", "id": "no-clipping", "severity": "warning", "text": "Not clipped."}
        >>> said_before([found, found, {**found, "severity": "note"}], 0)
        [(0, 'no-clipping: Not clipped')]
    """
    return [
        (step, text)
        for severity in ("error", "warning")
        for text, step in {
            f"{event.get('id')}: {event.get('text', '')}".rstrip("."): _step(event)
            for event in events
            if event.get("event") == "recipe" and event.get("severity") == severity and _step(event) <= begin
            and event.get("id") != "not-learning"
        }.items()
    ]  # fmt: skip


def _seen(event: Mapping[str, Any], series: Series) -> str:
    rule = str(event.get("rule", "")).replace(" ", "_").replace(",", "")
    told = _RULES.get(rule, rule.replace("_", " ") or "the step was out of line")
    ratios = []
    keys = (("loss", "loss", loss_key(series)), ("grad_norm", "gradient norm", "grad_norm/total"))
    for field, name, key in keys:
        value, points = event.get(field), series.get(key or "", ())
        now = bisect_left(points, _step(event), key=lambda point: point[0])
        normal = usual([past for _, past in points[max(0, now - 40) : now]])
        if isinstance(value, int | float) and math.isfinite(value) and normal > 0 and value > 1.05 * normal:
            ratios.append(f"the {name} was {value / normal:.3g} times its usual value")
    if rule in _RULES and "finite" in rule:
        return told
    wanted = [ratio for ratio in ratios if "gradient" in ratio or rule != "gradient_norm"]
    return " and ".join(wanted) or told


def _done(kind: str, step: int, event: Mapping[str, Any]) -> tuple[str, str]:
    to_step = event.get("to_step")
    lost = step - to_step if isinstance(to_step, int) else 0
    if kind == "skip":
        return "the step was not made", "1 step"
    if kind == "accept":
        return "the data has changed, and this level was accepted as the new normal", ""
    if kind == "rollback":
        return f"the weights went back to those of step {to_step}", count(max(lost, 1), "step")
    if not isinstance(to_step, int):
        return "too many steps in a row could not be made, and the run was stopped", "the rest of the run"
    good = f"; the weights of step {to_step} are in last_good.ckpt" if lost else ""
    return f"going back did not help, and the run was stopped{good}", "the rest of the run"


def _advice(event: Mapping[str, Any]) -> str:
    return f"what to do: {event['fix']}".rstrip(".") if event.get("fix") else ""


def _others(kind: str, event: Mapping[str, Any]) -> tuple[str, str, str]:
    """Seen, done, cost of what is not about stability."""
    if kind == "look":
        return "a bad step, on which a batch from before was run again", "the weights were found healthy", ""
    if kind == "jump":
        return "the data was suspected", "data was passed over", count(event.get("passed_over", "?"), "batch", "es")
    if kind == "shutdown":
        place = f", and was saved in {event['checkpoint']}" if event.get("checkpoint") else ", without a checkpoint"
        return f"the run was asked to stop ({event.get('reason', 'unknown reason')})", f"it did{place}", ""
    if kind == "resume":
        return "the run went on from here", "", ""
    if kind == "early_stop":
        best = f"the best was {event.get('best', 'unknown')} at step {event.get('best_step', 'unknown')}"
        return "validation had stopped getting better", f"the run ended with the weights of its best; {best}", ""
    if kind == "not_saved":
        return f"no checkpoint was saved: {event.get('reason', 'unknown reason')}", "", ""
    if kind == "save_failed":
        return f"a checkpoint could not be saved: {event.get('error', 'unknown error')}", "training went on", ""
    if kind == "hang":
        return (
            f"nothing had moved for {event.get('seconds', '?')} s",
            f"stacks are in {event.get('stacks', 'stacks.txt')}",
            "",
        )
    if kind == "unfreeze":
        trained = f"{event.get('parameters', '?')} parameters are trained"
        return f"stage {event.get('stage', '?')} of unfreezing began, {trained}", "", ""
    known = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("step", "event"))
    return f"{kind.replace('_', ' ')}{': ' if known else ''}{known}", "", ""


def _step(event: Mapping[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def count(number: Any, noun: str, plural: str = "s") -> str:
    """So many of them.

    Example:
        >>> count(1, "step"), count(2, "batch", "es")
        ('1 step', '2 batches')
    """
    return f"{number} {noun}{'' if number == 1 else plural}"
