"""The report for programs."""

import json
import math
from collections.abc import Sequence
from typing import Any

from lit_callbacks.report.panels import remarks
from lit_callbacks.report.run import Run


def facts(run: Run) -> dict[str, Any]:
    """Verdict, events and the last, lowest and highest value of every key, as plain types without NaN."""
    found = run.diagnosis()
    return {
        "run": run.name,
        "verdict": found.verdict,
        "culprit": found.culprit,
        "first_warning_step": found.first_warning_step,
        "sentences": list(found.sentences),
        "state": run.state,
        "notes": list(run.notes),
        "last_step": run.last_step,
        "events": [{**remark._asdict(), "text": str(remark)} for remark in remarks(run)],
        "values": {key: _summary([value for _, value in points]) for key, points in run.series.items() if points},
        "checkpoints": [
            {key: checkpoint.get(key) for key in ("name", "step", "epoch", "score", "suspect")}
            for checkpoint in run.checkpoints
        ],
        "settings": dict(run.settings),
    }


def as_json(runs: Sequence[Run]) -> str:
    """All runs."""
    return json.dumps({"runs": [facts(run) for run in runs]}, indent=1, allow_nan=False) + "\n"


def _summary(values: Sequence[float]) -> dict[str, float | int | None]:
    finite = [value for value in values if math.isfinite(value)]
    last = values[-1] if math.isfinite(values[-1]) else None
    return {
        "last": last, "min": min(finite, default=None), "max": max(finite, default=None),
        "count": len(values), "not_finite": len(values) - len(finite),
    }  # fmt: skip
