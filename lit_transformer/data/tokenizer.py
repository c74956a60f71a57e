"""Text to token ids and back: bytes, or a byte-level BPE or unigram model."""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, Model, Unigram
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer, Trainer, UnigramTrainer
from torch import Tensor

from lit_transformer.data.pretrained_tokenizer import load
from lit_transformer.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(ABC):
    """Every token stands for some bytes of UTF-8 text; special tokens stand for none.

    Attributes:
        pieces: The bytes of each token, by id.
        eos_id: The token that ends a document.
    """

    pieces: list[bytes]
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.pieces)

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text each token stands for, ``(vocab_size,)`` int64: what a loss in bits per byte divides by."""
        return torch.tensor([len(piece) for piece in self.pieces])

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text, without an end-of-document token."""

    @abstractmethod
    def to_json(self) -> str:
        """Return all that :func:`from_json` needs, as text that can travel in a checkpoint."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode ids as they arrive, holding back a character until all its bytes are there.

        Example:
            >>> list(ByteTokenizer().stream("né!".encode()))
            ['n', 'é', '!']
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self.pieces[i]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class ByteTokenizer(Tokenizer):
    """A token is a byte. Byte 0 does not occur in text, and ends a document.

    Example:
        >>> ByteTokenizer().encode("hé").tolist()
        [104, 195, 169]
    """

    eos_id = 0

    def __init__(self) -> None:
        self.pieces = [b"", *(bytes([i]) for i in range(1, 256))]

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of a text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def to_json(self) -> str:
        """Return the text that stands for this tokenizer."""
        return json.dumps({"type": "bytes"})


class ByteLevelTokenizer(Tokenizer):
    """A byte-level tokenizer in the format of Hugging Face's ``tokenizer.json``.

    Args:
        text: The JSON.

    Raises:
        UsageError: If it is no such JSON, not byte-level, or has no token that ends a document.
    """

    def __init__(self, text: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises nothing more specific
            raise UsageError(f"expected the JSON of a Hugging Face tokenizer, got {text[:40]!r}: {error}") from error
        self._tokenizer.encode_special_tokens = True  # a document that says "<|endoftext|>" does not end there
        if '"ByteLevel"' not in json.dumps(json.loads(text)["pre_tokenizer"]):
            raise UsageError(
                "expected a byte-level tokenizer (the kind of GPT-2, Llama 3, Qwen), got one whose tokens do not stand "
                "for a fixed number of bytes. Train one with tokenizer=bpe or unigram, or use tokenizer=bytes."
            )
        ids = self._tokenizer.get_vocab()
        ends = [ids[token] for token in _END_TOKENS if token in ids]
        if not ends:
            raise UsageError(f"expected a token that ends a document, one of {_END_TOKENS}; the tokenizer has none")
        self.eos_id = ends[0]
        added = self._tokenizer.get_added_tokens_decoder()
        self.pieces = [b""] * (max(ids.values()) + 1)
        for token, i in ids.items():
            if i not in added:
                self.pieces[i] = bytes(_BYTE_OF[character] for character in token)
            elif not added[i].special:
                self.pieces[i] = token.encode()

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def to_json(self) -> str:
        """Return the ``tokenizer.json``."""
        return str(self._tokenizer.to_str())


class BPETokenizer(ByteLevelTokenizer):
    """Byte-pair encoding (Sennrich et al., 2016) of bytes (Radford et al., 2019)."""

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from documents; ``<|endoftext|>`` is token 0.

        Raises:
            UsageError: If the text has too few different words for so many tokens.
        """
        return cls(_train(BPE(), BpeTrainer(vocab_size=vocab_size, **_SETTINGS), documents, vocab_size))


class UnigramTokenizer(ByteLevelTokenizer):
    """A unigram model (Kudo, 2018) of bytes: of all ways to cut a word, the tokens that are most probable together."""

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "UnigramTokenizer":
        """Learn tokens and their probabilities from documents; ``<|endoftext|>`` is token 0.

        Raises:
            UsageError: If the text has too few different words for so many tokens.
        """
        trainer = UnigramTrainer(vocab_size=vocab_size, **_SETTINGS)
        return cls(_in_order(_train(Unigram(), trainer, documents, vocab_size)))


TRAINED: dict[str, type[BPETokenizer] | type[UnigramTokenizer]] = {"bpe": BPETokenizer, "unigram": UnigramTokenizer}
"""The tokenizers that are trained on the text, by name."""

_SETTINGS: dict[str, Any] = {
    "special_tokens": [END_OF_TEXT],
    "initial_alphabet": ByteLevel.alphabet(),
    "show_progress": False,
}


def _train(model: Model, trainer: Trainer, documents: Iterable[str], vocab_size: int) -> str:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(documents, trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise UsageError(
            f"expected enough training text for bpe_vocab_size={vocab_size}, got a vocabulary of {learned} with "
            f"nothing left to learn. Set bpe_vocab_size={learned}, or give text of more different words."
        )
    return str(tokenizer.to_str())


def _in_order(text: str) -> str:
    """Give the tokens of a unigram model the same ids and scores each time it is trained.

    The trainer goes through words in an order that differs from run to run, which moves the last digits of the scores,
    and gives bytes that the text does not have scores one ten-thousandth apart, in that order too.
    """
    about = json.loads(text)
    end, *rest = about["model"]["vocab"]
    scores = {token: round(score, 9) for token, score in rest}
    rarest = min(scores.values()) + 256 * 1e-4
    unseen = sorted(token for token, score in scores.items() if len(token) == 1 and score <= rarest)
    scores |= dict(zip(unseen, sorted((scores[token] for token in unseen), reverse=True), strict=True))
    ordered = sorted(scores.items(), key=lambda token: (-token[1], token[0]))
    about["model"]["vocab"] = [end, *(list(token) for token in ordered)]
    return json.dumps(about, ensure_ascii=False)


def from_json(text: str) -> Tokenizer:
    """Rebuild a tokenizer from its :meth:`Tokenizer.to_json`, or from the text of a ``tokenizer.json``.

    Example:
        >>> from_json(ByteTokenizer().to_json()).vocab_size
        256
    """
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    try:
        is_unigram = json.loads(text)["model"]["type"] == "Unigram"
    except (ValueError, LookupError, TypeError):
        is_unigram = False  # an older BPE, or no tokenizer, which the next line says
    return UnigramTokenizer(text) if is_unigram else BPETokenizer(text)


def from_file(path: str) -> Tokenizer:
    """Read a ``tokenizer.json``, or take that of a Hugging Face tokenizer's folder or name."""
    file = Path(path).expanduser()
    if (file / "tokenizer.json").is_file():
        file /= "tokenizer.json"
    elif not (file.is_file() or path.endswith(".json")):
        backend = getattr(load(path), "backend_tokenizer", None)
        if backend is None:
            raise UsageError(f"expected a tokenizer with a tokenizer.json, got {path}, which is written in Python")
        return from_json(backend.to_str())
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected the path of a tokenizer.json, got {path!r}: {error}") from error


def _byte_alphabet() -> dict[str, int]:
    """Map the printable characters that byte-level BPE writes for bytes back to the bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
