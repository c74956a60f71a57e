"""Alarms of observers: what is bad several times in a row, what is out of line with its own past, and who is told."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_callbacks._events import EventLog


class InARow:
    """Counts, for many names, how often in a row something was bad.

    Args:
        patience: Bad times in a row that make an alarm.

    Example:
        >>> rows = InARow(patience=2)
        >>> [rows.judge({"a": bad}) for bad in (True, False, True, True, True)]
        [[], [], [], ['a'], []]
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.counts: dict[str, int] = {}

    def judge(self, bad: Mapping[str, bool]) -> list[str]:
        """The names that have just become an alarm."""
        for name, is_bad in bad.items():
            self.counts[name] = self.counts.get(name, 0) + 1 if is_bad else 0
        return [name for name in bad if self.counts[name] == self.patience]


class OwnPast:
    """The last accepted values of many series, whose medians are what is normal for each.

    Args:
        window: Values to remember.
        least: Values a series must have before its median says something.

    Example:
        >>> past = OwnPast(window=20, least=2)
        >>> past.medians({"a": 5.0})  # nothing to compare with: itself
        {'a': 5.0}
        >>> past.keep({"a": 1.0}), past.keep({"a": 3.0})
        (None, None)
        >>> past.medians({"a": 5.0})
        {'a': 2.0}
    """

    def __init__(self, window: int, least: int) -> None:
        self.window, self.least = window, least
        self.values: dict[str, list[float]] = {}

    def medians(self, values: Mapping[str, float]) -> dict[str, float]:
        """The median of the past of each; a value without one is its own."""
        pasts = {name: self.values.get(name, []) for name in values}
        return {
            name: statistics.median(past) if len(past) >= self.least else values[name] for name, past in pasts.items()
        }

    def keep(self, values: Mapping[str, float]) -> None:
        """Remember these, but for those that are not finite."""
        for name, value in values.items():
            if math.isfinite(value):
                self.values[name] = [*self.values.get(name, []), value][-self.window :]

    def state_dict(self) -> dict[str, list[float]]:
        """A copy, as plain types."""
        return {name: list(values) for name, values in self.values.items()}


def raise_alarm(events: EventLog, step: int, alarm: str, where: Sequence[str], message: str, **details: Any) -> None:
    """Write an alarm into the run folder and say it on the console.

    Args:
        events: The run's events.
        step: When.
        alarm: Its name.
        where: Layers, heads or parameters.
        message: What has happened, with ``{where}`` where the first few of those belong.
        details: More for the run folder.
    """
    events.write(step=step, event="alarm", alarm=alarm, where=list(where), **details)
    some = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
    rank_zero_warn(f"step {step}: {message.format(where=some)}")
