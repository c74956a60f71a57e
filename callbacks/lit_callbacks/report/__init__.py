"""The offline report: what became of a run, as one HTML file made from its folder alone.

On the command line ``python -m lit_callbacks.report RUN``; in Python:

    from pathlib import Path
    from lit_callbacks.report import read_run, write_report
    write_report([read_run(Path("lightning_logs/version_0"))], Path("report.html"))
"""

from collections.abc import Sequence
from pathlib import Path

from lit_callbacks.report.machine import as_json
from lit_callbacks.report.page import page
from lit_callbacks.report.picture import draw
from lit_callbacks.report.run import ReportError, Run, read_run

__all__ = ["ReportError", "Run", "as_json", "draw", "page", "place_of", "read_run", "write_report"]


def place_of(runs: Sequence[Run]) -> Path:
    """Where the page is written unless told otherwise.

    Returns:
        ``report.html`` in the folder of a run; of several ``compared.html`` beside the first one's folder, as each may
        have a page of its own.
    """
    first = runs[0].folder
    if len(runs) == 1:
        return first / "report.html"
    return (first.resolve() if first.name in ("", "..") else first).parent / "compared.html"


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the report of one run, or of several that are compared, as the suffix of ``path`` says.

    Args:
        runs: As ``read_run`` gives them.
        path: ``.html`` for the page, ``.png`` for a picture, ``.json`` for programs.

    Raises:
        ReportError: If there is no run, the suffix is none of these, or the file cannot be written.
    """
    if not runs:
        raise ReportError("expected at least one run, got none")
    if path.suffix not in (".html", ".png", ".json"):
        raise ReportError(f"expected a file that ends with .html, .png or .json, got {path}; rename it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            draw(runs, path)
        else:
            path.write_text(page(runs) if path.suffix == ".html" else as_json(runs), encoding="utf-8")
    except ImportError as error:
        raise ReportError(f"{path} needs matplotlib, got {error}; pip install matplotlib, or take .html") from error
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}; choose another place with --to") from error
