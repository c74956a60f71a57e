"""What texts become, in a file that the next run reads."""

import contextlib
import json
import os
import uuid
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_transformer.errors import UsageError


class Remembered:
    """A file of JSON lines: who has made the texts, then pairs of a text and what it becomes.

    It appears complete or not at all.

    Args:
        path: The file.
        makers: Names of who makes the texts.

    Example:
        >>> import tempfile
        >>> remembered = Remembered(Path(tempfile.mkdtemp()) / "a.jsonl", ["to", "back"])
        >>> remembered.write({"hello": "hi"})
        >>> remembered.read()
        {'hello': 'hi'}
    """

    def __init__(self, path: Path, makers: list[str]) -> None:
        self.path, self.makers = path.expanduser(), makers

    def read(self) -> dict[str, str]:
        """What is in the file; nothing, if there is none yet.

        Raises:
            UsageError: If it is of other makers, or cannot be read.
        """
        if not self.path.exists():
            return {}
        try:
            with self.path.open(encoding="utf-8") as file:
                makers = json.loads(next(file, "null"))
                made = dict(map(json.loads, file)) if makers == self.makers else {}
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.path} cannot be read as JSON lines of texts: {error}; name another file") from None
        if makers != self.makers:
            raise UsageError(
                f"expected in {self.path} what {self.makers} have made, got texts of {makers!s:.200}; name another file"
            )
        return made

    def write(self, made: dict[str, str]) -> None:
        """Replace what is in the file; where that fails, training can go on."""
        unfinished = self.path.with_name(f".{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in (self.makers, *made.items()))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except OSError as error:
            rank_zero_warn(f"What texts become cannot be kept in {self.path} ({error}): the next run makes it again.")
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
