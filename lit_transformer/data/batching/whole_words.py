"""Which tokens are one word, told by their bytes."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.batching.order import Ids


class Words:
    """Where words begin in rows of tokens.

    A token goes on with the word before it if that one ends, and it begins, with a letter, a mark or a digit. All else,
    such as white space, punctuation and special tokens, is a word of its own each, as in BERT. A part of a character
    that is not ASCII counts as a letter: so does all punctuation beyond ASCII where tokens are bytes.

    Args:
        pieces: The bytes of each token, by id.

    Cost: half a microsecond a token id once; some 15 nanoseconds a token.

    Example:
        >>> words = Words([b"", b"un", b"like", b" ly", b"."])
        >>> words.starts(np.array([[1, 2, 3, 4, 4, 1, 0]])).astype(int).tolist()
        [[1, 0, 1, 1, 1, 1, 1]]
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        edges = [piece.decode(errors="replace") for piece in pieces]
        self._opens = np.array([_belongs(text[:1]) for text in edges])
        self._closes = np.array([_belongs(text[-1:]) for text in edges])

    def starts(self, ids: Ids, documents: Ids | None = None) -> NDArray[np.bool_]:
        """Whether each of ``(rows, length)`` tokens begins a word; the first of a row, and of a document, does."""
        first = np.ones_like(ids, dtype=bool)
        first[:, 1:] = ~(self._closes[ids[:, :-1]] & self._opens[ids[:, 1:]])
        if documents is not None:
            first[:, 1:] |= documents[:, 1:] != documents[:, :-1]
        return first

    def spread(self, chosen: NDArray[np.bool_], ids: Ids, documents: Ids | None = None) -> NDArray[np.bool_]:
        """Give all tokens of a word what its first one has."""
        places = np.where(self.starts(ids, documents), np.arange(ids.shape[1]), 0)
        return np.take_along_axis(chosen, np.maximum.accumulate(places, axis=1), axis=1)


def _belongs(character: str) -> bool:
    """Whether it is inside a word; no character is not, and a part of one, U+FFFD, is."""
    return character == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(character or " ")[0] in "LMN"
