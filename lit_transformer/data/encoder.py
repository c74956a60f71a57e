"""Texts to token ids of a limited length, by a tokenizer of ours or of Hugging Face."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_transformer.data.batching.order import Ids
from lit_transformer.data.pretrained_tokenizer import load
from lit_transformer.data.tokenizer import TRAINED, ByteTokenizer, Tokenizer, from_file, from_json
from lit_transformer.errors import UsageError


class Encoder:
    """A function from texts to token ids.

    Args:
        tokenizer: ``"bytes"``, ``"bpe"``, ``"unigram"``, a ``tokenizer.json``, or the folder or name of a Hugging Face
            tokenizer.
        max_length: Longest text in tokens, special ones included.
        bpe_vocab_size: Tokens that ``"bpe"`` and ``"unigram"`` learn in :meth:`train`.
        saved: The :attr:`state` of another, to be the same; what ``tokenizer`` names need not be there then.

    Raises:
        UsageError: If there is no such tokenizer, or it is there and another than the saved one.

    Example:
        >>> ids, lengths = Encoder("bytes", max_length=3)(["abcd", "e"])
        >>> ids, lengths.tolist()
        ([[97, 98, 99], [101]], [4, 1])
    """

    def __init__(
        self, tokenizer: str, max_length: int, bpe_vocab_size: int = 0, saved: Mapping[str, Any] | None = None
    ) -> None:
        self.max_length, self.bpe_vocab_size = max_length, bpe_vocab_size
        self.name = tokenizer
        self._theirs: Any = None
        self._ours: Tokenizer | None = None
        if saved is not None:
            text = saved["tokenizer"]
            self._ours = None if text is None else from_json(text)
            self._theirs = None if text is not None else _rebuilt(saved["hugging_face_tokenizer"])
            if not self._is(tokenizer):
                raise UsageError(
                    f"the tokenizer of the checkpoint, of {self.vocab_size:,} tokens, is not tokenizer={tokenizer}: "
                    "leave tokenizer out, to use the one in the checkpoint"
                )
        elif tokenizer == "bytes":
            self._ours = ByteTokenizer()
        elif tokenizer.endswith(".json"):
            self._ours = from_file(tokenizer)
        elif tokenizer not in TRAINED:
            self._theirs = load(tokenizer)

    def _is(self, tokenizer: str) -> bool:
        """Whether a setting names this one; where it names something that is not there, whether it can be."""
        if tokenizer in TRAINED:
            model = json.loads(self._ours.to_json()).get("model", {}) if self._ours is not None else {}
            return str(model.get("type")).lower() == tokenizer
        if tokenizer == "bytes" or Path(tokenizer).expanduser().exists():
            return self.is_like(Encoder(tokenizer, self.max_length))
        if tokenizer.endswith(".json"):
            return self._ours is not None and not isinstance(self._ours, ByteTokenizer)
        return self._theirs is not None

    def is_like(self, other: "Encoder") -> bool:
        """Whether another has the same tokens."""
        return bool(self._pieces() == other._pieces())

    def _pieces(self) -> Any:
        if self._ours is not None:
            return self._ours.to_json()
        backend = getattr(self._theirs, "backend_tokenizer", None)
        if backend is None:
            return self._theirs.get_vocab()
        return json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # which are of the last call

    @property
    def is_trained(self) -> bool:
        """Whether texts can be encoded already."""
        return self._ours is not None or self._theirs is not None

    def train(self, texts: Iterable[str]) -> None:
        """Learn the tokens of ``"bpe"`` or ``"unigram"``; nothing for other tokenizers, or a second time."""
        if not self.is_trained:
            self._ours = TRAINED[self.name].train(texts, self.bpe_vocab_size)

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

    @cached_property
    def state(self) -> dict[str, str | None]:
        """All that makes it again, as text: of a tokenizer of ours, or of one of Hugging Face; after :meth:`train`."""
        if self._ours is not None:
            return {"tokenizer": self._ours.to_json(), "hugging_face_tokenizer": None}
        with tempfile.TemporaryDirectory() as folder:
            self._theirs.save_pretrained(folder)
            # Not all of them are text: SentencePiece has a model.
            files = {path.name: path.read_bytes().decode("latin-1") for path in sorted(Path(folder).glob("*.*"))}
        return {"tokenizer": None, "hugging_face_tokenizer": json.dumps(files, ensure_ascii=False)}

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], Ids]:
        """The ids of each text, cut off at ``max_length``, and how many there were."""
        if self._ours is not None:
            whole = [self._ours.encode(text).tolist() for text in texts]
            return [ids[: self.max_length] for ids in whole], _lengths(whole)
        return self._by_theirs(texts, self.max_length)

    def ended(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], Ids]:
        """Likewise, of texts that each end with :attr:`eos_id`, which is among the ``max_length`` tokens."""
        room = max_length - 1
        if self._ours is not None:
            whole = [self._ours.encode(text).tolist() for text in texts]
            return [[*ids[:room], self.eos_id] for ids in whole], _lengths(whole) + 1
        found, lengths = self._by_theirs(texts, max_length)
        closed = np.array([row[-1:] == [self.eos_id] for row in found], dtype=bool)
        ended = [row if end else [*row[:room], self.eos_id] for row, end in zip(found, closed, strict=True)]
        return ended, lengths + ~closed

    def _by_theirs(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], Ids]:
        options = {"truncation": True, "max_length": max_length, "verbose": False}
        ids = self._theirs(list(texts), **options)["input_ids"]
        lengths = _lengths(ids)
        at_limit = np.flatnonzero(lengths == max_length)
        if len(at_limit):
            whole = self._theirs([texts[i] for i in at_limit.tolist()], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            lengths[at_limit] = _lengths(whole) + self._theirs.num_special_tokens_to_add()
        return ids, lengths


def _lengths(rows: Sequence[Sequence[int]]) -> Ids:
    return np.array([len(row) for row in rows], dtype=np.int64)


def _rebuilt(files: str) -> Any:
    """The tokenizer of Hugging Face that some files make."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in json.loads(files).items():
            Path(folder, Path(name).name).write_bytes(text.encode("latin-1"))
        return load(folder)
