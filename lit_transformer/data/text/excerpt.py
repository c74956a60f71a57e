"""Text of a file that need not fit into memory."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from lit_transformer.errors import UsageError

_READ = 2**14
_LONGEST = 2**20


@dataclass(frozen=True)
class Excerpt:
    """Some bytes of a file of UTF-8 text, to be measured, indexed and sliced as ``bytes`` are.

    Args:
        path: The file.
        start: The first byte.
        stop: The byte after the last one.

    Cost: 16 KiB, whatever the length; up to 1 MiB where no word ends, see :meth:`pieces`.

    Example:
        >>> text = Excerpt(Path(__file__), 0, 100)
        >>> len(text[3:7]), "".join(text[3:7].pieces()), text[3] == ord("T")
        (4, 'Text', True)
    """

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> "Excerpt": ...

    def __getitem__(self, place: "int | slice") -> "int | Excerpt":
        if isinstance(place, slice):
            first, last, _ = place.indices(len(self))
            return Excerpt(self.path, self.start + first, self.start + max(first, last))
        with self.path.open("rb") as file:
            file.seek(self.start + place)
            return file.read(1)[0]

    def pieces(self) -> Iterator[str]:
        """Read the text in pieces that have the tokens of the whole.

        A piece ends where a letter or digit is followed by a space or a line end. Byte-level tokenizers split text
        there before they do anything else: in the patterns of GPT-2, Llama 3, Qwen and GPT-4o no match has both sides
        of it, and what precedes it does not depend on what follows. More than 1 MiB without such a place is cut
        anywhere between two characters, and may have other tokens there than the whole.

        Raises:
            UsageError: If the file cannot be read, or is not UTF-8.
        """
        held, searched = "", 0
        for text in self.decoded():
            end = _word_end(held, searched) or (len(held) if len(held) >= _LONGEST else 0)
            if end:
                yield held[:end]
                held = held[end:]
            searched = len(held)
            held += text
        if held:
            yield held

    def decoded(self) -> Iterator[str]:
        """Read the text as it comes, in pieces of some 16 KiB.

        Raises:
            UsageError: If the file cannot be read, is binary or not UTF-8; with place and line.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        place, line = self.start, 1
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                more = True
                while more:
                    chunk = file.read(min(_READ, self.stop - place))
                    more = bool(chunk)
                    if (zero := chunk.find(0)) >= 0:
                        raise UsageError(
                            f"expected UTF-8 text, got a zero byte at position {place + zero}, in line "
                            f"{line + chunk.count(10, 0, zero)}, of {self.path}: it is binary, or UTF-16. "
                            "Leave it out, or convert it to UTF-8."
                        )
                    begun = len(decoder.getstate()[0])
                    text = decoder.decode(chunk, final=not more)
                    place += len(chunk)
                    line += chunk.count(10)
                    if text:
                        yield text
        except UnicodeDecodeError as error:
            line += chunk.count(10, 0, max(error.start - begun, 0))
            raise UsageError(
                f"expected UTF-8 text, got {error.reason} at byte {place - begun + error.start}, in line {line}, of "
                f"{self.path}. Convert it to UTF-8, or leave it out."
            ) from error
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error


def _word_end(text: str, since: int) -> int:
    """Return the last place, not before a given one, where a word ends in a space, else in a line end, or 0."""
    for mark in " \n":
        i = text.rfind(mark, max(since, 1))
        while i > 0 and not text[i - 1].isalnum():
            i = text.rfind(mark, max(since, 1), i)
        if i > 0:
            return i
    return 0
