"""What was heard of a run: in so many numbers that a checkpoint can hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lit_callbacks._redaction import redacted
from lit_callbacks._step_losses import Means
from lit_callbacks._trace import Trace
from lit_callbacks.health.series import training_loss_key

TRAIN_LOSS = "train/loss"
_SECTIONS = frozenset(
    ("grad_norm", "attention_entropy", "attention_logit_max", "dead_neurons", "residual", "train", "val")
)
_LEVELS = ("train", "val")
_POINTS = 128  # beside the last 200
_LATE_LOSSES, _LOSSES = 1000, 1000  # the last ones, and of those before: the levels of a noisy value need many
_EVENTS, _ITEMS = 200, 8  # the last events, and the first items of a list in one
_WAITING = 500  # losses, on the device


class Heard:
    """Values over the steps by key, the last values of heads and of recovery's counters, and the last events."""

    def __init__(self) -> None:
        self.curves: dict[str, Trace] = {}
        self.last: dict[str, float] = {}
        self.events: list[dict[str, Any]] = []
        self.loss_key = TRAIN_LOSS
        self._waiting: list[Means] = []

    def keep(self, step: int, values: Mapping[str, float]) -> None:
        """Those that heat maps and verdict are made of."""
        for key, value in values.items():
            if "_head_" in key or key.startswith("loss_spike/"):
                self.last[key] = value
            elif key.partition("/")[0] in _SECTIONS or key.endswith("loss"):
                if key not in self.curves:
                    self.curves[key] = _trace(key)
                self.curves[key].add(step, value)

    def was_made(self, step: int) -> bool:
        """Whether the coming step is, as far as events tell."""
        last = self.events[-1] if self.events else {}
        return not (last.get("step") == step and last.get("event") in ("skip", "rollback", "stop"))

    def keep_losses(self, means: Means | None, logged: Iterable[str] = ()) -> None:
        """Training losses, which go by the name under which one is logged if it is; the host reads many at once."""
        self.loss_key = training_loss_key(dict.fromkeys(logged, ())) or self.loss_key
        if means is not None:
            self._waiting.append(means)
        if sum(len(means.steps) for means in self._waiting) >= _WAITING:
            self.read_losses()

    def read_losses(self) -> None:
        """Read the training losses that wait on the device."""
        if self._waiting:
            values = torch.cat([means.values for means in self._waiting]).tolist()
            known = [pair for means in self._waiting for pair in zip(means.steps, means.factors, strict=True)]
            self._waiting = []
            made = [
                (step, factor * value) for (step, factor), value in zip(known, values, strict=True) if step is not None
            ]
            if made and TRAIN_LOSS not in self.curves:
                self.curves[TRAIN_LOSS] = _trace(TRAIN_LOSS)
            for point in made:
                self.curves[TRAIN_LOSS].add(*point)

    def keep_event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """An event without secrets and with the first items of its lists; it is returned as it is kept."""
        kept: dict[str, Any] = redacted(
            {key: value[:_ITEMS] if isinstance(value, list) else value for key, value in event.items()}
        )
        self.events = [*self.events, kept][-_EVENTS:]
        return kept

    def cut(self, step: int) -> None:
        """Forget what lies ahead of a step that training goes on from."""
        self._waiting = []
        for curve in self.curves.values():
            curve.cut(step)
        self.events = [event for event in self.events if event.get("step", 0) <= step]

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """``(step, value)`` pairs by key; the training loss under the one that it is logged by."""
        self.read_losses()
        found = {key: points for key, curve in self.curves.items() if (points := curve.points)}
        return {self.loss_key if key == TRAIN_LOSS else key: points for key, points in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain types."""
        self.read_losses()
        return {
            "curves": {key: curve.state_dict() for key, curve in self.curves.items()},
            "last": dict(self.last),
            "events": [dict(event) for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.curves = {key: Trace(**curve) for key, curve in state["curves"].items()}
        self.last = dict(state["last"])
        self.events = [dict(event) for event in state["events"]]


def _trace(key: str) -> Trace:
    section = key.partition("/")[0]
    if key == TRAIN_LOSS:
        return Trace("first", _LOSSES, late=_LATE_LOSSES)
    if section in _LEVELS or key.endswith("loss"):
        return Trace("first", _POINTS)
    return Trace("low" if section == "attention_entropy" else "high", _POINTS)
