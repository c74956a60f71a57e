"""Files that are there whole or not at all, whatever happens to the process or the machine."""

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHUNK = 2**23  # bytes, a multiple of what a mapping begins at
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.(partial|unfinished)$")


def replace_durably(path: Path, write: Callable[["HashedFile"], None]) -> tuple[int, str]:
    """Let ``write`` fill a file under a temporary name beside ``path``, bring it to the disk, and rename it.

    The temporary file is in the same folder, because a rename is atomic only within a file system: Lightning's own
    "atomic" save goes through TMPDIR, and leaves truncated files where that is another device. A failure leaves
    ``path`` as it was.

    Returns:
        The number of bytes and their SHA-256.
    """
    partial = temporary_beside(path, "partial")
    try:
        with HashedFile(partial) as file:
            write(file)
            size, digest = file.sync()
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size, digest


class HashedFile:
    """A file that is written from its beginning to its end, and hashed by a thread that reads behind the writer.

    Hashing takes about as long as writing, and the thread has the other processor, also while the disk is waited for.
    What it reads is mapped, so that nothing is copied.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._written, self._is_over = 0, False
        self._more = threading.Condition()
        self._sha, self._failure = hashlib.sha256(), ""
        self._thread = threading.Thread(target=self._hash, name="sha256", daemon=True)
        self._thread.start()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._file.close()

    def write(self, data: Any) -> int:
        """Append."""
        view = memoryview(data).cast("B")
        left = view
        while left:
            left = left[self._file.write(left) :]
        with self._more:
            self._written += len(view)
            self._more.notify()
        return len(view)

    def flush(self) -> None:
        """Nothing: it is not buffered."""

    def sync(self) -> tuple[int, str]:
        """Bring it to the disk; the number of bytes and their SHA-256."""
        with self._more:
            self._is_over = True
            self._more.notify()
        os.fsync(self._file.fileno())
        self._finish()
        if self._failure:
            raise OSError(self._failure)
        return self._written, self._sha.hexdigest()

    def _finish(self) -> None:
        with self._more:
            self._is_over = True
            self._more.notify()
        self._thread.join()

    def _hash(self) -> None:
        try:
            with self.path.open("rb") as file:
                done = 0
                while size := self._next(done):
                    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=done) as part:
                        self._sha.update(part)
                    done += size
        except (OSError, ValueError) as error:
            self._failure = f"what was written to {self.path} cannot be read back: {error}"

    def _next(self, done: int) -> int:
        """How many bytes to hash next: whole chunks, as long as there is more to come."""
        with self._more:
            self._more.wait_for(lambda: self._is_over or self._written - done >= _CHUNK)
            return min(self._written - done, _CHUNK)


@contextlib.contextmanager
def unfinished(path: Path, remove: Callable[[Path], None]) -> Iterator[None]:
    """Mark ``path`` as one that is being made; if that fails, or the process is killed meanwhile, it is removed.

    A file under its final name that nobody has committed would otherwise lie there for ever.
    """
    marker = temporary_beside(path, "unfinished")
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


def temporary_beside(path: Path, kind: str) -> Path:
    """A name that :func:`remove_leftovers` knows, of the kind ``partial`` or ``unfinished``."""
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
