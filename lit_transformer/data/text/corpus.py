"""The text to learn from: files found, read and checked."""

import os
import sys
import sysconfig
from math import inf
from pathlib import Path

from lit_transformer.data.text.excerpt import Excerpt
from lit_transformer.data.text.progress import Progress
from lit_transformer.errors import UsageError

Documents = dict[str, bytes]
"""Contents by name, in order."""

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def standard_library() -> list[Path]:
    """Find the source of the running Python's standard library: the corpus that is on every machine.

    Packages installed beside it, tests, and generated files (character tables, help texts, build settings) do not
    count.

    Raises:
        UsageError: If this Python came without source, as an embedded or zipped one does.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_SOURCE)
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not found:
        raise UsageError(
            f"expected the source of Python's standard library in {root}, got no .py file: "
            f"{sys.executable} came without it. Pass files=... to train on text of your own."
        )
    return sorted(found)


def find(files: str | list[str]) -> list[Path]:
    """Find the files that paths and globs name, sorted, each once.

    Args:
        files: Paths or globs; ``**`` matches folders at any depth.

    Raises:
        UsageError: If a path does not exist, is a folder, or a glob matches no file.

    Example:
        >>> [path.name for path in find(__file__)]
        ['corpus.py']
    """
    found: set[Path] = set()
    for pattern in [files] if isinstance(files, str) else files:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UsageError(f"expected files or a glob, got the folder {pattern!r}. Write {path / '**' / '*.txt'}.")
        root = Path(path.anchor)
        matches = [path] if path.is_file() else [m for m in root.glob(str(path.relative_to(root))) if m.is_file()]
        if not matches:
            raise UsageError(f"expected a file or a glob that matches files, got {pattern!r}. Check the spelling.")
        found.update(match.resolve() for match in matches)
    if not found:
        raise UsageError("expected at least one file, got an empty list. Leave files out for the default corpus.")
    return sorted(found)


def check(paths: list[Path], max_bad: float = 0) -> tuple[dict[str, Excerpt], list[str]]:
    """Read files as UTF-8 text and keep where they are; empty ones are left out.

    Args:
        paths: The files.
        max_bad: How many may be binary, not UTF-8, or unreadable; they are left out.

    Returns:
        The texts, named by their path below the folder they share; and what is wrong with each of the bad files.

    Raises:
        UsageError: If there are more bad files, or nothing is left.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    documents: dict[str, Excerpt] = {}
    bad: list[str] = []
    with Progress("reading text", sum(path.stat().st_size for path in paths)) as progress:
        for path in paths:
            document = Excerpt(path, 0, path.stat().st_size)
            try:
                for _ in progress.over(document.decoded()):
                    pass
            except UsageError as error:
                bad.append(str(error))
                if len(bad) > max_bad:
                    before = f" It is bad file {len(bad)}, more than were allowed." if len(bad) > 1 else ""
                    raise UsageError(f"{error}{before}") from error
            else:
                if document:
                    documents[path.relative_to(root).as_posix()] = document
    if not documents:
        reason = bad[0] if bad else f"the first of them {paths[0]}"
        kind = "bad or empty" if bad else "empty"
        raise UsageError(f"expected text, got {len(paths)} {kind} file(s), {reason}")
    return documents, bad


def read(paths: list[Path], leave_out_others: bool = False) -> Documents:
    """Read files as UTF-8 text, named by their path below the folder they share; empty ones are left out.

    Args:
        paths: The files.
        leave_out_others: Leave out what is binary or not UTF-8 as well, instead of refusing it.

    Raises:
        UsageError: If a file is binary or not UTF-8, or nothing is left.
    """
    documents, _ = check(paths, inf if leave_out_others else 0)
    return {name: document.path.read_bytes() for name, document in documents.items()}
