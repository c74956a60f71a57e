"""What was heard of a run: in so many numbers that a checkpoint can hold them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_callbacks._redaction import redacted
from lit_callbacks._trace import Trace

TRAIN_LOSS = "train/loss"
_SECTIONS = frozenset(
    ("grad_norm", "attention_entropy", "attention_logit_max", "dead_neurons", "residual", "train", "val")
)
_LEVELS = ("train", "val")
_POINTS, _LOSS_POINTS = 128, 2000  # beside the last 200
_EVENTS, _ITEMS = 200, 8  # the last events, and the first items of a list in one
_WAITING = 50  # losses, on the device


class Heard:
    """Values over the steps by key, the last values of heads and of recovery's counters, and the last events."""

    def __init__(self) -> None:
        self.curves: dict[str, Trace] = {}
        self.last: dict[str, float] = {}
        self.events: list[dict[str, Any]] = []
        self._losses: list[tuple[int, Tensor]] = []

    def keep(self, step: int, values: Mapping[str, float]) -> None:
        """Those that heat maps and verdict are made of."""
        for key, value in values.items():
            if "_head_" in key or key.startswith("loss_spike/"):
                self.last[key] = value
            elif key.partition("/")[0] in _SECTIONS or key.endswith("loss"):
                if key not in self.curves:
                    self.curves[key] = _trace(key)
                self.curves[key].add(step, value)

    def keep_loss(self, step: int, loss: Tensor) -> None:
        """A training loss, 0-d, unless its step was not made; the host reads many at once."""
        last = self.events[-1] if self.events else {}
        if last.get("step") == step and last.get("event") in ("skip", "rollback", "stop"):
            return
        self._losses.append((step, loss))
        if len(self._losses) >= _WAITING:
            self.read_losses()

    def read_losses(self) -> None:
        """Read the training losses that wait on the device."""
        if self._losses:
            values = torch.stack([loss for _, loss in self._losses]).tolist()
            for (step, _), value in zip(self._losses, values, strict=True):
                self.keep(step, {TRAIN_LOSS: value})
            self._losses = []

    def keep_event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """An event without secrets and with the first items of its lists; it is returned as it is kept."""
        kept: dict[str, Any] = redacted(
            {key: value[:_ITEMS] if isinstance(value, list) else value for key, value in event.items()}
        )
        self.events = [*self.events, kept][-_EVENTS:]
        return kept

    def cut(self, step: int) -> None:
        """Forget what lies ahead of a step that training goes on from."""
        self._losses = []
        for curve in self.curves.values():
            curve.cut(step)
        self.events = [event for event in self.events if event.get("step", 0) <= step]

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """``(step, value)`` pairs by key."""
        self.read_losses()
        return {key: points for key, curve in self.curves.items() if (points := curve.points)}

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
    if section in _LEVELS or key.endswith("loss"):
        return Trace("first", _LOSS_POINTS if key == TRAIN_LOSS else _POINTS)
    return Trace("low" if section == "attention_entropy" else "high", _POINTS)
