"""Which events of a run are still true."""

from collections.abc import Mapping, Sequence
from typing import Any


def without_undone(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what lay ahead of a checkpoint that the run has gone on from: those steps were made anew.

    And without what another run has written there before this one began.

    Args:
        events: Lines of ``events.jsonl``, in the order in which they were written.

    Example:
        >>> lines = [(90, "skip"), (150, "stop"), (120, "resume"), (130, "skip")]
        >>> kept = without_undone([{"step": step, "event": event} for step, event in lines])
        >>> [event["step"] for event in kept]
        [90, 120, 130]
    """
    kept: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("event") == "begin":
            kept = []
            continue
        if event.get("event") == "resume" and isinstance(event.get("step"), int):
            kept = [other for other in kept if not isinstance(other.get("step"), int) or other["step"] <= event["step"]]
        kept.append(event)
    return kept
