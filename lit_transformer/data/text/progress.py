"""How far something is that may take long."""

import sys
import time
from collections.abc import Iterable, Iterator

from lightning_utilities.core.rank_zero import rank_zero_only

_SECONDS_BEFORE_THE_FIRST = 3.0
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REFRESHES = 0.2


class Progress:
    """Say on stderr how far something is, on rank zero, and only if it takes more than three seconds.

    On a terminal a bar, elsewhere a line every ten seconds.

    Args:
        name: What is done.
        total: How many bytes it is done to.

    Cost: a clock reading per piece.

    Example:
        >>> with Progress("reading", total=4) as progress:
        ...     list(progress.over(["a", "bcd"]))
        ['a', 'bcd']
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done, self.lines = 0, 0
        self._is_terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._due = self._started + _SECONDS_BEFORE_THE_FIRST

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.lines and self._is_terminal:
            sys.stderr.write("\n")

    def over(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass pieces of text on, and count what of them is done with."""
        for piece in pieces:
            yield piece
            self._add(len(piece.encode()))

    def _add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now < self._due or getattr(rank_zero_only, "rank", 0) != 0:
            return
        self._due = now + (_SECONDS_BETWEEN_REFRESHES if self._is_terminal else _SECONDS_BETWEEN_LINES)
        self.lines += 1
        share = self.done / max(self.total, self.done, 1)
        left = (now - self._started) * (1 - share) / max(share, 1e-9)
        bar = f"|{'#' * round(20 * share):<20}| " if self._is_terminal else ""
        line = f"{self.name}: {bar}{share:.0%} of {self.total / 1e6:,.0f} MB, {left:,.0f} s left"
        sys.stderr.write(f"\r{line}\033[K" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()
