"""Alarms of observers: what is bad several times in a row, what is out of line with its own past, and who is told."""

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
    """The last values of many series; a new one is compared with the median of its own, and kept if in line with it.

    Args:
        window: Values to remember.

    Example:
        >>> past = OwnPast(window=20)
        >>> for value in [1.0, 1.1, 0.9, 1.0, 1.0]:
        ...     _ = past.outside({"a": value}, low=0.5)
        >>> past.outside({"a": 0.2}, low=0.5), past.outside({"a": 0.8}, low=0.5)
        ({'a': True}, {'a': False})
    """

    LEAST = 5
    """Values a series must have before it can be judged."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.values: dict[str, list[float]] = {}

    def outside(self, values: Mapping[str, float], low: float = 0.0, high: float = float("inf")) -> dict[str, bool]:
        """Whether each value is below ``low`` or above ``high`` times its median; NaN always is."""
        outside = {}
        for name, value in values.items():
            past = self.values.get(name, [])
            median = statistics.median(past) if len(past) >= self.LEAST else value
            outside[name] = not low * median <= value <= high * median
            if not outside[name]:
                self.values[name] = [*past, value][-self.window :]
        return outside

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
