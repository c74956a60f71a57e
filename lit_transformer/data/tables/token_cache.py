"""Token ids of the texts of a table, made once and memory-mapped from then on."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lit_transformer.data.batching.order import Ids
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.text.array_file import ArrayFile
from lit_transformer.data.text.cached_folder import cached_folder
from lit_transformer.data.text.progress import Progress

_FORMAT = 1  # raised when what is written changes
_AT_ONCE = 4096  # texts, whose ids are Python's numbers for a moment

Encode = Callable[[Sequence[str]], tuple[list[list[int]], Ids]]


def encoded_once(encode: Encode, texts: Sequence[str], how: str, cache_dir: str | None) -> tuple[Ragged, Ids]:
    """Return the ids of each text, and how many there were before they were cut off.

    Args:
        encode: Texts to ids, and how many there were.
        texts: The texts.
        how: All that the ids depend on besides.
        cache_dir: Where to keep them; by default ``lit-transformer`` in the user's cache folder.

    Cost: a first start encodes; a later one takes the SHA-256 of the texts.

    Example:
        >>> import tempfile
        >>> from lit_transformer.data.encoder import Encoder
        >>> rows, lengths = encoded_once(Encoder("bytes", 2), ["abc", "d"], "bytes, 2", tempfile.mkdtemp())
        >>> rows[0].tolist(), rows[1].tolist(), lengths.tolist()
        ([97, 98], [100], [3, 1])
    """
    digest = hashlib.sha256(f"{_FORMAT} {how}".encode())
    for text in texts:
        content = text.encode()
        digest.update(f"\0{len(content)}\0".encode())
        digest.update(content)
    folder = cached_folder(cache_dir, f"table-{digest.hexdigest()[:32]}", partial(_write, encode, texts))
    tokens = np.load(folder / "tokens.npy", mmap_mode="r").view(np.ndarray)
    return Ragged.of(tokens, np.load(folder / "ends.npy")), np.load(folder / "lengths.npy")


def _write(encode: Encode, texts: Sequence[str], folder: Path) -> None:
    ends, lengths = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    total = sum(map(len, texts))
    with ArrayFile(folder / "tokens.npy", np.uint32) as file, Progress("tokenising", total) as progress:
        for start in range(0, len(texts), _AT_ONCE):
            rows, before = encode(list(progress.over(texts[start : start + _AT_ONCE])))
            ends.append(file.length + np.cumsum([len(row) for row in rows], dtype=np.int64))
            file.append(np.concatenate([np.array(row, dtype=np.uint32) for row in rows]))
            lengths.append(before)
    np.save(folder / "ends.npy", np.concatenate(ends))
    np.save(folder / "lengths.npy", np.concatenate(lengths))
