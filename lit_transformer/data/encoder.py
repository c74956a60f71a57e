"""Texts to token ids of a limited length, by a tokenizer of ours or of Hugging Face."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_transformer.data.tokenizer import ByteTokenizer, Tokenizer, from_file
from lit_transformer.errors import UsageError


class Encoder:
    """A function from texts to token ids.

    Args:
        tokenizer: ``"bytes"``, a ``tokenizer.json``, or the folder or name of a Hugging Face tokenizer.
        max_length: Longest text in tokens, special ones included.

    Raises:
        UsageError: If there is no such tokenizer.

    Example:
        >>> Encoder("bytes", max_length=3)(["abcd", "e"])
        ([[97, 98, 99], [101]], 1)
    """

    def __init__(self, tokenizer: str, max_length: int) -> None:
        self.max_length = max_length
        self._theirs: Any = None
        self._ours: Tokenizer | None = None
        if tokenizer == "bytes":
            self._ours = ByteTokenizer()
        elif tokenizer.endswith(".json"):
            self._ours = from_file(tokenizer)
        else:
            self._theirs = _hugging_face(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._theirs) if self._ours is None else self._ours.vocab_size

    @property
    def pad_id(self) -> int:
        """What fills up a batch."""
        if self._ours is not None:
            return self._ours.eos_id
        pad, end = self._theirs.pad_token_id, self._theirs.eos_token_id
        return int(next((token for token in (pad, end) if token is not None), 0))

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids of each text, and how many texts were too long."""
        if self._ours is not None:
            whole = [self._ours.encode(text).tolist() for text in texts]
            return [ids[: self.max_length] for ids in whole], sum(len(ids) > self.max_length for ids in whole)
        options = {"truncation": True, "max_length": self.max_length, "verbose": False}
        ids = self._theirs(list(texts), **options)["input_ids"]
        room = self.max_length - self._theirs.num_special_tokens_to_add()
        at_limit = [text for text, found in zip(texts, ids, strict=True) if len(found) == self.max_length]
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
            f"expected tokenizer to be 'bytes', a tokenizer.json, or the folder or OWNER/NAME of a Hugging Face "
            f"tokenizer, got {name!r}, and there is no such folder"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"no tokenizer can be loaded from {name}: {reason}") from None
