"""``report``: what became of a run, as one HTML file made from its folder alone."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

import lit_transformer
from lit_callbacks.health import Points
from lit_callbacks.report import ReportError, Run, place_of, read_run, write_report
from lit_transformer.commands.parser import CommandParser
from lit_transformer.errors import UsageError
from lit_transformer.optim.schedule import Schedule

_POINTS = 500


def main(words: list[str]) -> None:
    """Write the report, and print where it is and the verdict.

    Raises:
        UsageError: If a run cannot be found or read, or the report not be written.
    """
    parser = CommandParser(prog="report", description="What became of a run, or of several that are compared.")
    parser.add_argument("runs", nargs="*", type=str, metavar="RUN", help="Names or folders; by default the last run.")
    parser.add_argument("--run", type=str | None, default=None, help="The same as RUN.")
    parser.add_argument("--root", type=str, default="runs", help="Where the runs are.")
    default = "by default RUN/report.html, of several compared.html beside the first RUN."
    parser.add_argument("--to", nargs="+", type=str, help=f"Files, .html, .png or .json; {default}")
    options = parser.parse_args(words)
    names = [*options.runs, *([options.run] if options.run else [])]
    root = Path(options.root)
    try:
        runs = [_planned(read_run(_folder(root, name))) for name in names or [_last(root)]]
        for path in map(Path, options.to or [place_of(runs)]):
            write_report(runs, path)
            print(f"Report: {path}")
    except ReportError as error:
        raise UsageError(str(error)) from None
    for run in runs:
        print(f"\n{run.name}:", *run.diagnosis().sentences, sep="\n  ")


def _folder(root: Path, name: str) -> Path:
    """That of a run's name, also where another of that name is beside it; or a folder."""
    run = root / name
    return Path(name) if Path(name).exists() and not run.exists() else run


def _last(root: Path) -> str:
    """The run that wrote something down last."""
    files = [path for name in ("metrics.csv", "events.jsonl") for path in root.glob(f"*/{name}")]
    if not files:
        raise UsageError(f"there are no runs under {root}; name one, or give --root FOLDER")
    return str(max(files, key=lambda path: path.stat().st_mtime).parent)


def _planned(run: Run) -> Run:
    """The run with the learning rates of its schedule, where its configuration has one of ours and a length."""
    try:
        config: Any = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        spec = config["model"]["init_args"]["schedule"]
        # By name from here: what a configuration from elsewhere names is not imported.
        cls: Any = getattr(lit_transformer, spec["class_path"].removeprefix("lit_transformer."))
        peak, steps = (
            float(config["model"]["init_args"]["optimizer"]["init_args"]["lr"]),
            config["trainer"]["max_steps"],
        )
        if not issubclass(cls, Schedule) or steps < 1:
            return run
        return dataclasses.replace(run, planned=planned(cls(**spec.get("init_args", {})), peak, steps, run.last_step))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return run  # an older, foreign or damaged configuration: the rest of the report does without


def planned(schedule: Schedule, peak: float, steps: int, last: int) -> Points:
    """The learning rate at up to 500 steps of a run as far as it has come, and where its schedule turns.

    Example:
        >>> planned(lit_transformer.WarmupConstant(warmup=2), peak=1.0, steps=4, last=2)
        [(0, 0.5), (1, 1.0), (2, 1.0)]
    """
    last = min(last, steps - 1)
    even = {i * last // _POINTS for i in range(_POINTS + 1)}
    turns = {step for step in schedule.turning_points(steps).values() if step <= last}
    return [(step, peak * schedule.multiplier(step, steps)) for step in sorted(even | turns)]
