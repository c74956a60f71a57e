"""Documents held out of training for validation and test."""

import hashlib
from itertools import accumulate, pairwise
from typing import TypeVar

from lit_transformer.data.text.excerpt import Excerpt

Text = TypeVar("Text", bytes, Excerpt)

_FEWEST_FILES = 20


def split_documents(documents: dict[str, Text], fractions: dict[str, float]) -> dict[str, dict[str, Text]]:
    """Take validation and test documents out of the training documents.

    Twenty files or more are split by file, so that no text is on both sides: in the order of a hash of their names,
    files go to the first split until it holds its fraction of the bytes, then to the next; the rest is for training.
    Fewer files are split by position: the last bytes of their concatenation are held out.

    Args:
        documents: Everything; of an :class:`~lit_transformer.data.text.excerpt.Excerpt` only a few bytes are read.
        fractions: Fraction of the bytes of each split to take out.

    Returns:
        ``{"train": ..., **splits}``, each in the order of ``documents``.

    Example:
        >>> split_documents({"a.txt": b"0123456789"}, {"validation": 0.2, "test": 0.1})
        {'train': {'a.txt': b'0123456'}, 'validation': {'a.txt': b'78'}, 'test': {'a.txt': b'9'}}
    """
    return (split_by_file if len(documents) >= _FEWEST_FILES else _split_by_position)(documents, fractions)


def split_by_file(documents: dict[str, Text], fractions: dict[str, float]) -> dict[str, dict[str, Text]]:
    """Take whole files out, however few there are; see :func:`split_documents`."""
    waiting = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest(), reverse=True)
    total = sum(map(len, documents.values()))
    taken: dict[str, str] = {}
    for name, fraction in fractions.items():
        size = 0
        while size < fraction * total and waiting:
            document = waiting.pop()
            taken[document] = name
            size += len(documents[document])
    return {
        name: {document: content for document, content in documents.items() if taken.get(document, "train") == name}
        for name in ("train", *fractions)
    }


def _split_by_position(documents: dict[str, Text], fractions: dict[str, float]) -> dict[str, dict[str, Text]]:
    total = sum(map(len, documents.values()))
    names = ("train", *fractions)
    cuts = [round(total * share) for share in accumulate((1 - sum(fractions.values()), *fractions.values()), initial=0)]
    parts: dict[str, dict[str, Text]] = {name: {} for name in names}
    offset = 0
    for document, content in documents.items():
        for name, (lower, upper) in zip(names, pairwise(cuts), strict=True):
            piece = content[_character(content, lower - offset) : _character(content, upper - offset)]
            if piece:
                parts[name][document] = piece
        offset += len(content)
    return parts


def _character(content: Text, position: int) -> int:
    """Return the start of the character at a position, within the content."""
    i = min(max(position, 0), len(content))
    while i < len(content) and content[i] & 0xC0 == 0x80:
        i -= 1
    return i
