"""What recovery and guards did to a run, in episodes, and whether they ended it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_callbacks.health.remarks import count

ACTIONS = ("skip", "rollback", "accept", "stop")
EPISODE = 12
"""Steps between two actions of one episode: the patience of LossSpikeRecovery."""


def episodes_of(actions: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Actions that belong together."""
    episodes: list[list[Mapping[str, Any]]] = []
    for event in actions:
        if episodes and event["step"] - episodes[-1][-1]["step"] <= EPISODE:
            episodes[-1].append(event)
        else:
            episodes.append([event])
    return episodes


def stopped(events: Sequence[Mapping[str, Any]], end: int) -> int | None:
    """The step at which recovery or a guard ended the run, if it was not gone on with."""
    last = next((event for event in reversed(events) if event.get("event") in ("resume", *ACTIONS)), None)
    if last is None or last["event"] != "stop" or end > last["step"] + EPISODE:
        return None
    return int(last["step"])


def what_was_done(actions: Sequence[Mapping[str, Any]], episodes: int) -> tuple[str, ...]:
    """In a sentence, with what it cost; none where nothing was done."""
    if not actions:
        return ()
    kinds = [event["event"] for event in actions]
    went_back = [event for event in actions if event["event"] == "rollback"]
    undone = [(min(_whole(event, "to_step", event["step"]), event["step"] - 1), event["step"]) for event in went_back]
    left_out = [(event["step"], event["step"] + 1) for event in actions if event["event"] == "skip"]
    lost = _covered([*undone, *left_out])
    parts = [count(kinds.count("skip"), "skipped step")]
    if went_back:
        parts.append(f"weights put back {times(len(went_back))}")
    if accepted := kinds.count("accept"):
        parts.append(f"a new level accepted {times(accepted)}")
    return (f"What was done: {', '.join(parts)}, in {count(episodes, 'episode')}; it cost {count(lost, 'step')}.",)


def times(n: int) -> str:
    """How often.

    Example:
        >>> times(1), times(2), times(3)
        ('once', 'twice', '3 times')
    """
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _covered(stretches: Sequence[tuple[int, int]]) -> int:
    """Steps in stretches ``(begin, end)``, each counted once: a step that is undone twice was made once."""
    covered, reached = 0, 0
    for begin, end in sorted(stretches):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _whole(event: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = event.get(key)
    return value if isinstance(value, int) else otherwise
