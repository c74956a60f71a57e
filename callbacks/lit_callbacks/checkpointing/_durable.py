"""Files that are there whole or not at all, whatever happens to the process or the machine."""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_CHUNK = 2**20  # bytes
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.(partial|unfinished)$")


def replace_durably(path: Path, write: Callable[[Path], None]) -> tuple[int, str]:
    """Let ``write`` make a file under a temporary name beside ``path``, bring it to the disk, and rename it.

    The temporary file is in the same folder, because a rename is atomic only within a file system: Lightning's own
    "atomic" save goes through TMPDIR, and leaves truncated files where that is another device. What is read back for
    the digest is what the operating system has taken, while it writes it out. A failure leaves ``path`` as it was.

    Returns:
        The number of bytes and their SHA-256.
    """
    partial = _temporary(path, "partial")
    try:
        write(partial)
        size, digest = _digest_and_sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size, digest


@contextlib.contextmanager
def unfinished(path: Path, remove: Callable[[Path], None]) -> Iterator[None]:
    """Mark ``path`` as one that is being made; if that fails, or the process is killed meanwhile, it is removed.

    A file under its final name that nobody has committed would otherwise lie there for ever.
    """
    marker = _temporary(path, "unfinished")
    marker.touch()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            marker.unlink()


def unfinished_names(folder: Path) -> set[str]:
    """Names that are marked as being made, by a living process or a killed one."""
    found = (_LEFTOVER.match(file.name) for file in folder.glob(".*.unfinished"))
    return {match["name"] for match in found if match}


def digest(path: Path) -> tuple[int, str]:
    """Number of bytes of a file and their SHA-256."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return size, sha.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; Windows and some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, is_whole: Callable[[Path], bool], remove: Callable[[Path], None]) -> None:
    """Delete what saves that were killed have left, but not what a process that is still alive is writing.

    Args:
        folder: Where they were saving.
        is_whole: Whether a path that was marked as unfinished has been finished all the same.
        remove: Deletes such a path.
    """
    for file in folder.glob(".*"):
        found = _LEFTOVER.match(file.name)
        if found and found["host"] == _host() and not _is_alive(int(found["pid"])):
            with contextlib.suppress(OSError):
                if file.suffix == ".unfinished" and not is_whole(folder / found["name"]):
                    remove(folder / found["name"])
                file.unlink()


def _digest_and_sync(path: Path) -> tuple[int, str]:
    failures: list[OSError] = []

    def sync() -> None:
        try:
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=sync, name="fsync", daemon=True)
    thread.start()
    try:
        result = digest(path)
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return result


def _temporary(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own saves are over when this is asked
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
