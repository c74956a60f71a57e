"""Events, skipped samples, checkpoints and settings of a run, as tables."""

from collections.abc import Mapping, Sequence

from lit_callbacks.health import Remark
from lit_callbacks.report.markup import Markup, element, joined, note, table
from lit_callbacks.report.run import Run

_SHOWN = 300  # rows; the files have them all
_SAMPLES = 8  # ids of skipped samples that are named
_QUIET = ("recipe", "look", "unfreeze")
"""Kinds of events that give way where there are too many."""


def event_table(run_number: int, told: Sequence[Remark]) -> Markup:
    """Every event, explained."""
    if not told:
        return element("p", "No event was written down.")
    kept = sorted(sorted(range(len(told)), key=lambda i: told[i].kind in _QUIET)[:_SHOWN])
    rows = (
        element(
            "tr",
            element("td", str(told[i].step), kind="number"),
            element("td", told[i].kind.replace("_", " ")),
            element("td", f"{told[i].seen}, first seen in {told[i].where}" if told[i].where else told[i].seen),
            element("td", told[i].done),
            element("td", told[i].cost),
            id=f"event-{run_number}-{i}",
        )
        for i in kept
    )
    more = len(told) - len(kept)
    heads = ("Step", "Event", "What was seen", "What was done", "Cost")
    return joined([table(heads, rows), note(f"{more} more are in events.jsonl.") if more else None])


def sample_table(run: Run) -> Markup:
    """Which samples were in steps that were not made."""
    skipped = [event for event in run.events if isinstance(event.get("sample_ids"), list)]
    passed = sum(event["passed_over"] for event in run.events if isinstance(event.get("passed_over"), int))
    total = sum(len(event["sample_ids"]) for event in skipped)
    rows = (
        element(
            "tr",
            element("td", str(event["step"]), kind="number"),
            element("td", str(len(event["sample_ids"])), kind="number"),
            element(
                "td", ", ".join(str(sample) for sample in event["sample_ids"][:_SAMPLES]) + _dots(event["sample_ids"])
            ),
        )
        for event in skipped[:_SHOWN]
    )
    text = f"{total} samples are known to be in steps that were not made; {passed} batches were passed over."
    return joined([element("p", text), table(("Step", "Samples", "The first of them"), rows) if skipped else None])


def checkpoint_table(run: Run) -> Markup:
    """Checkpoints by their manifests."""
    if not run.checkpoints:
        return note("No checkpoint with a manifest is in the folder.")
    rows = (
        element(
            "tr",
            element("td", str(checkpoint["name"])),
            element("td", str(checkpoint["step"]), kind="number"),
            element("td", str(checkpoint.get("score"))),
            element("td", str(checkpoint.get("suspect") or "good")),
        )
        for checkpoint in run.checkpoints
    )
    return table(("Checkpoint", "Step", "Score", "State"), rows)


def setting_tables(runs: Sequence[Run]) -> Markup:
    """What differs between runs, and, folded up, what does not."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return note("The configuration was not saved.")
    values = {name: [run.settings.get(name, "") for run in runs] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    same = [name for name in names if len(set(values[name])) == 1]
    heads = ["Setting", *(run.name for run in runs)] if len(runs) > 1 else ["Setting", "Value"]
    summary = f"{len(same)} settings{' that are the same' if len(runs) > 1 else ''}"
    return joined(
        [
            joined([element("p", "What differs:"), _settings(differ, values, heads)]) if differ else None,
            element("details", element("summary", summary), _settings(same, values, heads)),
        ]
    )


def _settings(names: Sequence[str], values: Mapping[str, Sequence[str]], heads: Sequence[str]) -> Markup:
    rows = (
        element("tr", element("td", element("code", name)), *(element("td", value) for value in values[name]))
        for name in names
    )
    return table(heads, rows)


def _dots(ids: Sequence[object]) -> str:
    return " …" if len(ids) > _SAMPLES else ""
