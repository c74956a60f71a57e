"""The text to learn from: files found, read and checked."""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

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


def read(paths: list[Path], leave_out_others: bool = False) -> Documents:
    """Read files as UTF-8 text, named by their path below the folder they share; empty ones are left out.

    Args:
        paths: The files.
        leave_out_others: Leave out what is binary or not UTF-8 as well, instead of refusing it.

    Raises:
        UsageError: If a file is binary or not UTF-8, or nothing is left.
    """
    root = Path(os.path.commonpath([path.parent for path in paths]))
    documents = {}
    for path in paths:
        content = path.read_bytes()
        if leave_out_others and not _is_text(content):
            continue
        if (zero := content.find(0)) >= 0:
            raise UsageError(
                f"expected UTF-8 text, got a zero byte at position {zero} of {path}: it is binary, or UTF-16. "
                "Leave it out, or convert it to UTF-8."
            )
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"expected UTF-8 text, got {error.reason} at byte {error.start} of {path}. "
                "Convert it to UTF-8, or leave it out."
            ) from error
        if content:
            documents[path.relative_to(root).as_posix()] = content
    if not documents:
        raise UsageError(f"expected text, got {len(paths)} empty file(s), the first of them {paths[0]}")
    return documents


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def content_hash(splits: dict[str, Documents]) -> str:
    """Return the SHA-256 of all names and contents, split by split."""
    digest = hashlib.sha256()
    for name, documents in splits.items():
        for document, content in documents.items():
            digest.update(f"{name}\0{document}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
