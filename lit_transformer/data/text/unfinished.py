"""Folders that are not done yet, and whose process may have died."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "lock"


@contextmanager
def unfinished_folder(root: Path, name: str) -> Iterator[Path]:
    """Make a folder that appears under its name when it is complete, or never.

    If the name is taken by then, it was another process that was faster, and what it wrote is kept. What processes
    that were killed have left in ``root`` is removed; a process that lives holds a lock, which the system drops at its
    end, however it ends. On Windows, and on file systems without locks, it stays.

    Args:
        root: Where the folders are.
        name: Name of the complete folder.

    Yields:
        The folder to fill.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> with unfinished_folder(root, "data") as folder:
        ...     _ = (folder / "a.txt").write_text("a")
        >>> [path.name for path in root.rglob("*")]
        ['data', 'a.txt']
    """
    _remove_the_dead(root)
    folder, lock = _make(root)
    try:
        yield folder
        _publish(folder, root / name)
        (root / name / _LOCK).unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(root: Path) -> tuple[Path, int | None]:
    while True:
        folder = root / f".{uuid.uuid4().hex}.unfinished"
        folder.mkdir()
        try:
            lock = _hold(folder)
        except BlockingIOError:  # taken for dead in the moment before it was held
            continue
        except OSError:
            if not folder.exists():
                continue
            lock = None
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _hold(folder: Path) -> int | None:
    """Lock a folder; None where there are no locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_the_dead(root: Path) -> None:
    for folder in root.glob(".*.unfinished"):
        try:
            lock = _hold(folder)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _publish(folder: Path, name: Path) -> None:
    try:
        folder.rename(name)
    except OSError:
        if not name.exists():  # else another process was first, with the same outcome
            raise
