"""``python -m lit_callbacks.report RUN [RUN ...] [--to FILE ...]``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_callbacks.report import ReportError, place_of, read_run, write_report


def main(words: Sequence[str] | None = None) -> int:
    """Write the report, and say where it is and what the verdict is.

    Returns:
        0, or 2 if it could not be made.
    """
    parser = argparse.ArgumentParser(prog="python -m lit_callbacks.report", description="What became of a run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a run; several are compared.")
    parser.add_argument(
        "--to", nargs="+", type=Path, metavar="FILE",
        help="Files ending with .html, .png or .json; by default RUN/report.html, of several compared.html beside the "
        "first RUN.",
    )  # fmt: skip
    options = parser.parse_args(words)
    try:
        runs = [read_run(folder) for folder in options.runs]
        for path in options.to or [place_of(runs)]:
            write_report(runs, path)
            sys.stdout.write(f"Report: {path}\n")
    except ReportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for run in runs:
        sys.stdout.write(f"{run.name}: {' '.join(run.diagnosis().sentences)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
