"""Texts to token ids of a limited length, by a tokenizer of ours or of Hugging Face."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_transformer.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, from_file
from lit_transformer.errors import UsageError


class Encoder:
    """A function from texts to token ids.

    Args:
        tokenizer: ``"bytes"``, ``"bpe"``, a ``tokenizer.json``, or the folder or name of a Hugging Face tokenizer.
        max_length: Longest text in tokens, special ones included.
        bpe_vocab_size: Tokens that ``"bpe"`` learns in :meth:`train`.

    Raises:
        UsageError: If there is no such tokenizer.

    Example:
        >>> Encoder("bytes", max_length=3)(["abcd", "e"])
        ([[97, 98, 99], [101]], 1)
    """

    def __init__(self, tokenizer: str, max_length: int, bpe_vocab_size: int = 0) -> None:
        self.max_length, self.bpe_vocab_size = max_length, bpe_vocab_size
        self._theirs: Any = None
        self._ours: Tokenizer | None = None
        if tokenizer == "bytes":
            self._ours = ByteTokenizer()
        elif tokenizer.endswith(".json"):
            self._ours = from_file(tokenizer)
        elif tokenizer != "bpe":
            self._theirs = _hugging_face(tokenizer)

    def train(self, texts: Iterable[str]) -> None:
        """Learn the tokens of ``"bpe"``; nothing for other tokenizers, or a second time."""
        if self._ours is None and self._theirs is None:
            self._ours = BPETokenizer.train(texts, self.bpe_vocab_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; known before :meth:`train`."""
        if self._ours is not None:
            return self._ours.vocab_size
        return self.bpe_vocab_size if self._theirs is None else len(self._theirs)

    @property
    def eos_id(self) -> int:
        """What ends a text."""
        if self._ours is not None:
            return self._ours.eos_id
        end, separator = self._theirs.eos_token_id, self._theirs.sep_token_id
        return int(next((token for token in (end, separator) if token is not None), 0))

    @property
    def pad_id(self) -> int:
        """What fills up a batch."""
        pad = None if self._theirs is None else self._theirs.pad_token_id
        return self.eos_id if pad is None else int(pad)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        if self._ours is not None:
            return self._ours.decode(ids)
        return str(self._theirs.decode(ids, skip_special_tokens=True))

    def to_json(self) -> str | None:
        """All that makes a tokenizer of ours again; None for one of Hugging Face."""
        return None if self._ours is None else self._ours.to_json()

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids of each text, and how many texts were too long."""
        if self._ours is not None:
            whole = [self._ours.encode(text).tolist() for text in texts]
            return [ids[: self.max_length] for ids in whole], sum(len(ids) > self.max_length for ids in whole)
        return self._by_theirs(texts, self.max_length)

    def ended(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
        """Likewise, of texts that each end with :attr:`eos_id`, which is among the ``max_length`` tokens."""
        room = max_length - 1
        if self._ours is not None:
            whole = [self._ours.encode(text).tolist() for text in texts]
            return [[*ids[:room], self.eos_id] for ids in whole], sum(len(ids) > room for ids in whole)
        ids, cut = self._by_theirs(texts, max_length)
        return [row if row[-1:] == [self.eos_id] else [*row[:room], self.eos_id] for row in ids], cut

    def _by_theirs(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
        options = {"truncation": True, "max_length": max_length, "verbose": False}
        ids = self._theirs(list(texts), **options)["input_ids"]
        room = max_length - self._theirs.num_special_tokens_to_add()
        at_limit = [text for text, found in zip(texts, ids, strict=True) if len(found) == max_length]
        lengths = map(
            len, self._theirs(at_limit, add_special_tokens=False, verbose=False)["input_ids"] if at_limit else []
        )
        return ids, sum(length > room for length in lengths)


def _hugging_face(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(f"the tokenizer {name} needs transformers: pip install 'lit-transformer[hf]'") from None
    if not Path(name).is_dir() and ("/" not in name or name.count("/") > 1 or name.startswith((".", "/"))):
        raise UsageError(
            f"expected tokenizer to be 'bytes', 'bpe', a tokenizer.json, or the folder or OWNER/NAME of a Hugging Face "
            f"tokenizer, got {name!r}, and there is no such folder"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"no tokenizer can be loaded from {name}: {reason}") from None
