"""One run, read from its folder: whatever is there, and a note about what is not."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_callbacks._redaction import redacted
from lit_callbacks.checkpointing.manifest import SUFFIX
from lit_callbacks.health import Diagnosis, Points, diagnose, without_undone
from lit_callbacks.markers import FINISHED, HEARTBEAT, STOPPED
from lit_callbacks.report._metrics import Numbers, read_csv, read_tensorboard, steps_of
from lit_callbacks.report._settings import plain, read_settings, without_secrets

_QUIET = 300  # seconds without a heartbeat after which a run is not being made any more


class ReportError(ValueError):
    """A folder that cannot be reported on; says what was expected and found, and what to do."""


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Args:
        name: To call it by.
        folder: Where it is.
        series: ``(step, value)`` pairs of every key, by step.
        events: Lines of ``events.jsonl``.
        settings: The configuration, flat, without secrets.
        checkpoints: Manifests, by step.
        state: Finished, stopped or under way, in words.
        notes: What is missing or damaged.
        planned: The learning rate as it was planned, if that is known.
    """

    name: str
    folder: Path
    series: Numbers
    events: list[dict[str, Any]]
    settings: Mapping[str, str] = field(default_factory=dict)
    checkpoints: tuple[Mapping[str, Any], ...] = ()
    state: str = ""
    notes: tuple[str, ...] = ()
    planned: Points = ()

    @property
    def last_step(self) -> int:
        """The last one that anything is known of."""
        return max([0, *steps_of(self.series), *(int(event["step"]) for event in self.events)])

    def diagnosis(self) -> Diagnosis:
        """The verdict."""
        return diagnose(self.series, self.events)


def read_run(folder: Path) -> Run:
    """Read what there is.

    Numbers come from ``metrics.csv`` (``lit_transformer``'s or that of Lightning's CSVLogger), and where there is none
    from TensorBoard's event files; the rest from ``events.jsonl``, ``config.yaml`` or ``hparams.yaml``, the manifests
    of checkpoints, ``heartbeat.json``, ``stopped.json`` and ``finished.json``. All but the numbers and events may be
    missing, and any of them may be cut off: the run may be under way.

    Args:
        folder: A run's folder, or a file in it.

    Raises:
        ReportError: If there is no such folder, or it is none of a run.
    """
    folder = _run_folder(folder)
    notes: list[str] = []
    series = _numbers(folder, notes)
    events = plain(_events(folder / "events.jsonl", notes))
    settings: dict[str, str] = {}
    for name in ("config.yaml", "hparams.yaml"):
        if (folder / name).is_file() and not settings:
            settings = _attempt(lambda path=folder / name: read_settings(path), {}, notes)
    if not settings:
        notes.append("There is no config.yaml or hparams.yaml: the configuration is not known.")
    checkpoints = tuple(plain(facts) for facts in _checkpoints(folder / "checkpoints", notes))
    name = folder.resolve().name
    if name.startswith("version_"):  # Lightning's loggers call every run so
        name = f"{folder.resolve().parent.name}/{name}"
    state = plain(_state(folder, notes))
    return Run(plain(name), folder, series, events, settings, checkpoints, state, tuple(map(plain, notes)))


def _run_folder(path: Path) -> Path:
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise ReportError(f"expected a run's folder, and there is no {path}; give the folder that has its metrics.csv")
    if any((folder / name).exists() for name in ("metrics.csv", "events.jsonl")) or any(folder.glob("*.tfevents.*")):
        return folder
    inside = sorted({found.parent for pattern in ("metrics.csv", "*.tfevents.*") for found in _below(folder, pattern)})
    if len(inside) == 1:
        return inside[0]
    some = ", ".join(str(run) for run in inside[-5:])
    hint = f"give one of the runs in it, such as {some}" if inside else _without_numbers(folder)
    raise ReportError(
        f"expected a run's folder with metrics.csv, events.jsonl or TensorBoard files, got {path}; {hint}"
    )


def _without_numbers(folder: Path) -> str:
    """What to do where nothing is that could be read."""
    if not any((*folder.glob("*.wandb"), *_below(folder, "*.wandb"), *folder.glob("wandb"))):
        return "give the folder that its logger wrote to"
    return (
        "there is W&B's own file alone, which is not read: let a CSVLogger write beside it, "
        "logger=[CSVLogger(...), WandbLogger(...)], and give the folder of the CSVLogger"
    )


def _below(folder: Path, pattern: str) -> Iterable[Path]:
    """In this folder's folders, two deep: not through a whole disk."""
    return [found for depth in ("*/", "*/*/") for found in folder.glob(depth + pattern)]


def _numbers(folder: Path, notes: list[str]) -> Numbers:
    series: Numbers = {}
    if (folder / "metrics.csv").is_file():
        try:
            series, bad = read_csv(folder / "metrics.csv")
        except (OSError, ValueError) as error:
            notes.append(f"metrics.csv could not be read: {error}.")
        else:
            if bad:
                notes.append(f"metrics.csv is damaged: {bad} of its lines could not be read and are left out.")
    files = sorted(folder.glob("*.tfevents.*"))
    if not series and files:
        try:
            series = read_tensorboard(files)
        except ImportError:
            notes.append("There are TensorBoard files, which need `pip install tensorboard` to be read.")
        except Exception as error:  # what the reader makes of a damaged file
            notes.append(f"TensorBoard's files could not be read: {error}.")
    if not series and not notes:
        notes.append("There are no numbers: metrics.csv is missing or empty. Nothing may have been logged yet.")
    return series


def _events(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no events.jsonl: either nothing happened, or no callback that writes it was there.")
        return []
    text = _attempt(lambda: path.read_text(encoding="utf-8", errors="replace"), "", notes)
    events: list[dict[str, Any]] = []
    bad = 0
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            bad += bool(line.strip())
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append({key: without_secrets(v) if isinstance(v, str) else redacted(v) for key, v in event.items()})
        else:
            bad += 1
    if bad:
        notes.append(f"events.jsonl is damaged: {bad} of its lines could not be read and are left out.")
    return sorted(map(dict, without_undone(events)), key=lambda event: int(event["step"]))


def _checkpoints(folder: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    found = {path.name.removesuffix(SUFFIX): _json(path, notes) for path in sorted(folder.glob(f"*{SUFFIX}"))}
    known = [{**facts, "name": name} for name, facts in found.items() if isinstance(facts.get("step"), int)]
    return tuple(sorted(known, key=lambda facts: (int(facts["step"]), facts["name"])))


def _state(folder: Path, notes: list[str]) -> str:
    if (folder / FINISHED).is_file():
        return "It has come to its end."
    if (folder / STOPPED).is_file():
        stopped = _json(folder / STOPPED, notes)
        return f"It was stopped at step {stopped.get('step', '?')}: {stopped.get('reason', 'for an unknown reason')}."
    if (folder / HEARTBEAT).is_file():
        beat = _json(folder / HEARTBEAT, notes)
        if beat.get("stage") == "end":
            return f"Its training has come to its end, at step {beat.get('step', '?')}."
        beaten = beat.get("time")
        if isinstance(beaten, int | float) and time.time() - beaten < _QUIET:
            return f"It is under way, at step {beat.get('step', '?')}: what follows may change."
        return f"It has not come to its end: its last sign of life was at step {beat.get('step', '?')}."
    return ""


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    found = _attempt(lambda: json.loads(path.read_text(encoding="utf-8", errors="replace")), {}, notes)
    return found if isinstance(found, dict) else {}


def _attempt(read: Any, otherwise: Any, notes: list[str]) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:
        notes.append(f"A file could not be read: {error}.")
        return otherwise
