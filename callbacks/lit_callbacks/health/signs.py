"""What was seen first: which layer's gradient, attention, activations or units were out of line with their own past."""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_callbacks.health.series import Points, Series

# Of ln g, in robust standard deviations of the 40 values before, which are at least 0.1: 0.5 alarms in 1000 healthy
# steps. While there are fewer than 20 of them, ten times their median, as for GradientNormLogger.
_K, _FLOOR, _WINDOW, _ENOUGH, _FEWEST, _RATIO = 12, 0.1, 40, 20, 5, 10.0
# As AttentionEntropyMonitor has it.
_COLLAPSE_RATIO, _COLLAPSE_LOGIT = 0.5, 50.0
DEAD = 0.7
"""A share of dead units above which a layer is in trouble: the most that is reported of a trained model (OPT-66B)."""

_KINDS = ("attention_in", "attention_out", "feed_forward_in", "feed_forward_out", "norm", "embedding", "head", "other")
_TOTALS = ("total", "clipped", "rms", "nonfinite", "exploding", "vanishing", "threshold", "clip_coefficient")
_NOT_LAYERS = {*_KINDS, *_TOTALS, "min", "window_tokens"}
_POSITIVE = {
    "grad_norm/": "the gradient norm",
    "residual/rms_": "the residual stream's size",
    "residual/max_": "the residual stream's largest element",
    "residual/kurtosis_": "the residual stream's kurtosis",
    "attention_logit_max/": "the largest attention logit",
}
_FORWARD = {
    **{prefix: text for prefix, text in _POSITIVE.items() if prefix != "grad_norm/"},
    "attention_entropy/": "the attention entropy",
}
_DIGITS = re.compile(r"\d+")
_SECTIONS = ("attention_entropy", "dead_neurons")
_ALARMS = {
    "gradient_not_finite": "the gradient was not finite",
    "gradient_exploding": "the gradient norm was far above its usual value",
    "gradient_vanishing": "the gradient had all but vanished",
    "entropy_collapse": "the attention entropy had collapsed",
    "attention_uniform": "attention still looked at everything alike",
}
_SORTS = {"finite": "not_finite", "vanishing": "vanishing", "gradient": "gradient"}

_NOT_FINITE, _ALARM, _PARAMETER, _AUTOPSY = 1e40, 1e41, 1e42, 1e43
"""Strengths, by how well they know the place; all are above those of finite values, which are ratios."""


class Sign(NamedTuple):
    """Something out of line."""

    step: int
    kind: str
    """``gradient``, ``vanishing``, ``attention``, ``residual``, ``neurons``, ``not_finite``, or, in no known place,
    ``unplaced``."""
    where: str
    strength: float
    """To compare signs of one step: how far out of line."""
    text: str

    @property
    def place(self) -> str:
        """To go on a sentence with; empty where it is not known."""
        return f", in {self.where}" if self.where else ""


def first_signs(
    series: Series, events: Sequence[Mapping[str, Any]], begin: int, end: int, losses: Points = ()
) -> list[Sign]:
    """All signs from step ``begin`` to ``end``, at most one of a series, the earliest and strongest first.

    Where the loss, one of ``losses``, is not finite, an alarm of the gradient does not say where that began.
    """
    near = {key: _between(points, begin, end) for key, points in series.items() if _is_watched(key)}
    gradients = _telling(list(_of_series(near, begin)), near)
    found = [*_of_events(events, losses), *gradients, *_first_not_finite(near, begin)]
    return sorted((sign for sign in found if begin <= sign.step <= end), key=order)


def order(sign: Sign) -> tuple[int, float]:
    """The earliest and, of one step, the strongest first."""
    return sign.step, -sign.strength


def alarm_text(alarm: str) -> str:
    """What an alarm means.

    Example:
        >>> alarm_text("entropy_collapse")
        'the attention entropy had collapsed'
    """
    return _ALARMS.get(alarm, alarm.replace("_", " "))


def _of_events(events: Sequence[Mapping[str, Any]], losses: Points) -> Iterator[Sign]:
    # With such a loss all gradients are not finite, and which parameter comes first says nothing.
    bad_losses = {event.get("step") for event in events if event.get("rule") == "non_finite_loss"}
    for event in events:
        step, kind, where = event.get("step"), event.get("event"), event.get("where")
        if not isinstance(step, int) or (step in bad_losses and kind != "autopsy"):
            continue
        if kind == "alarm" and isinstance(where, list) and where:
            alarm = str(event.get("alarm"))
            if "finite" in alarm and _is_lost(losses, step):
                text = "neither the loss nor any gradient was finite, and which layer began it is not known"
                yield Sign(step, "unplaced", "", 0.0, text)
                continue
            sort = next((kind for part, kind in _SORTS.items() if part in alarm), "attention")
            yield Sign(step, sort, str(where[0]), _ALARM, alarm_text(alarm))
        elif kind == "autopsy" and where:
            yield Sign(step, "not_finite", str(where), _AUTOPSY, "the first value that was not finite was made")
        elif kind in ("skip", "rollback", "stop") and event.get("parameter"):
            yield Sign(step, "not_finite", str(event["parameter"]), _PARAMETER, "the gradient was not finite")


def is_layer(name: str) -> bool:
    """Whether the end of a key names a layer, and not a total or a kind of weights of all layers.

    Example:
        >>> is_layer("layer_3"), is_layer("attention_in"), is_layer("total")
        (True, False, False)
    """
    return name not in _NOT_LAYERS


def _is_watched(key: str) -> bool:
    section, _, name = key.partition("/")
    return is_layer(name) and (section in _SECTIONS or key.startswith(tuple(_POSITIVE)))


def _between(points: Points, begin: int, end: int) -> Points:
    """Those from ``begin`` to ``end``, and what is needed to judge the first of them."""
    first = bisect_left(points, begin, key=lambda point: point[0])
    return points[max(0, first - _WINDOW) : bisect_right(points, end, key=lambda point: point[0])]


def _is_lost(losses: Points, step: int) -> bool:
    """Whether the loss of a step was not finite: it is known, or those around it are not."""
    after = bisect_left(losses, step, key=lambda point: point[0])
    known = after < len(losses) and losses[after][0] == step
    around = losses[after : after + 1] if known else losses[max(0, after - 1) : after + 1]
    return bool(len(around)) and not any(math.isfinite(value) for _, value in around)


def _telling(signs: list[Sign], near: Series) -> list[Sign]:
    """Without gradients that are not finite in every layer: which of them comes first says nothing."""
    layers = sum(key.startswith("grad_norm/") for key in near)
    text = f"{_POSITIVE['grad_norm/']} was not finite"
    lost = [sign.step for sign in signs if sign.text == text]
    return [sign for sign in signs if sign.text != text or layers < 2 or lost.count(sign.step) < layers]


def _of_series(series: Series, begin: int) -> Iterator[Sign]:
    for key, points in series.items():
        section, _, name = key.partition("/")
        sign = None
        if section == "attention_entropy":
            layer = name.partition("_head_")[0]
            sign = _collapse(name, points, dict(series.get(f"attention_logit_max/{layer}", ())), begin)
        elif section == "dead_neurons":
            at = next(((step, share) for step, share in points if step >= begin and share >= DEAD), None)
            sign = at and Sign(at[0], "neurons", name, at[1], f"{at[1]:.0%} of the units were dead")
        elif prefix := next((prefix for prefix in _POSITIVE if key.startswith(prefix)), None):
            sign = _too_large(key, prefix, points, begin)
        if sign is not None:
            yield sign


def _too_large(key: str, prefix: str, points: Points, begin: int) -> Sign | None:
    """The first value out of line in logs, upwards."""
    where = key.removeprefix(prefix)
    kind = {"grad_norm/": "gradient", "attention_logit_max/": "attention"}.get(prefix, "residual")
    # An excess kurtosis begins at -2.
    shift = 3.0 if prefix == "residual/kurtosis_" else 0.0
    past: list[float] = []
    for step, raw in points:
        value = raw + shift
        if not math.isfinite(value):
            if step >= begin and kind == "gradient":
                return Sign(step, "not_finite", where, _NOT_FINITE, f"{_POSITIVE[prefix]} was not finite")
            continue
        log = math.log(max(value, 1e-30))
        if step >= begin and len(past) >= _FEWEST:
            middle = float(np.median(past))
            spread = 1.4826 * float(np.median(np.abs(np.array(past) - middle)))
            limit = _K * max(spread, _FLOOR) if len(past) >= _ENOUGH else math.log(_RATIO)
            if log - middle > limit:
                times = math.exp(min(log - middle, 700.0))
                return Sign(step, kind, where, times, f"{_POSITIVE[prefix]} was {times:.3g} times its usual value")
        past = [*past, log][-_WINDOW:]
    return None


def _first_not_finite(near: Series, begin: int) -> Iterator[Sign]:
    """In the forward pass, the first layer whose values are not finite, unless none are: then it was before this step.

    Layers come in the order in which they were logged, and of one kind by their numbers.
    """
    for prefix, text in _FORWARD.items():
        layers: dict[str, dict[int, float]] = {}
        for key, points in near.items():
            if key.startswith(prefix):
                layers.setdefault(key.removeprefix(prefix).partition("_head_")[0], {}).update(points)
        bad = [
            step for points in layers.values() for step, v in points.items() if step >= begin and not math.isfinite(v)
        ]
        if not bad:
            continue
        kinds = list(dict.fromkeys(_DIGITS.sub("", name) for name in layers))
        names = sorted(layers, key=lambda name: (kinds.index(_DIGITS.sub("", name)), *map(int, _DIGITS.findall(name))))
        finite = {name: math.isfinite(layers[name][min(bad)]) for name in names if min(bad) in layers[name]}
        if len(finite) == 1 or any(finite.values()):
            at = list(finite.values()).index(False)
            before = f"; that of {list(finite)[at - 1]} before it still was" if at else ""
            yield Sign(min(bad), "not_finite", list(finite)[at], _NOT_FINITE, f"{text} was not finite{before}")


def _collapse(name: str, points: Points, logits: Mapping[int, float], begin: int) -> Sign | None:
    """The first entropy below half its usual value, with logits so large that it is not a choice that was learnt."""
    past: list[float] = []
    for step, value in points:
        if not math.isfinite(value):
            continue
        if len(past) >= _FEWEST and step >= begin:
            middle = float(np.median(past))
            if value < _COLLAPSE_RATIO * middle and logits.get(step, 0.0) > _COLLAPSE_LOGIT:
                text = f"the attention entropy fell from its usual {middle:.2f} to {value:.2f}"
                return Sign(step, "attention", name, middle / max(value, 1e-6), text)
        past = [*past, value][-_ENOUGH:]
    return None
