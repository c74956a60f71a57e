"""Who hears what our callbacks measure and do, beside the loggers and the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer


class Listener(Protocol):
    """Hears values and events of a run while they are logged and written; it must not raise."""

    def hear_values(self, step: int, values: Mapping[str, float], logged: bool) -> None:
        """Values by metric key, as a callback has measured them together; and whether the loggers get them too."""

    def hear_event(self, event: Mapping[str, Any]) -> None:
        """A line of ``events.jsonl``."""


_OF_VALUES: WeakKeyDictionary[Trainer, list[Listener]] = WeakKeyDictionary()
_OF_EVENTS: dict[Path, list[Listener]] = {}  # an event log knows its folder and not its trainer


def listen(listener: Listener, trainer: Trainer, folder: Path) -> None:
    """Hear the values of a trainer, and the events of its run folder."""
    stop_listening(listener)
    _OF_VALUES.setdefault(trainer, []).append(listener)
    _OF_EVENTS.setdefault(folder, []).append(listener)


def stop_listening(listener: Listener) -> None:
    """Hear nothing any more."""
    for registry in (_OF_VALUES, _OF_EVENTS):
        for listeners in registry.values():
            listeners[:] = [other for other in listeners if other is not listener]
    for folder in [folder for folder, listeners in _OF_EVENTS.items() if not listeners]:
        del _OF_EVENTS[folder]


def tell_values(trainer: Trainer, step: int, values: Mapping[str, float], logged: bool) -> None:
    """Let them hear values that are logged, or that are not because they would be too many lines."""
    for listener in _OF_VALUES.get(trainer, ()):
        listener.hear_values(step, values, logged)


def tell_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Let them hear an event."""
    for listener in _OF_EVENTS.get(folder, ()):
        listener.hear_event(event)
