"""Text to token ids and back: bytes, or byte-level BPE."""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

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


class BPETokenizer(Tokenizer):
    """A byte-level byte-pair encoding (Radford et al., 2019) in the format of Hugging Face's ``tokenizer.json``.

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
                "for a fixed number of bytes. Train one with tokenizer=bpe, or use tokenizer=bytes."
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

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from documents; ``<|endoftext|>`` is token 0.

        Raises:
            UsageError: If the text has too few different words for so many tokens.
        """
        tokenizer = tokenizers.Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        learned = tokenizer.get_vocab_size()
        if learned < vocab_size:
            raise UsageError(
                f"expected enough training text for bpe_vocab_size={vocab_size}, got a vocabulary of {learned} with "
                f"nothing left to merge. Set bpe_vocab_size={learned}, or give more text."
            )
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def to_json(self) -> str:
        """Return the ``tokenizer.json``."""
        return str(self._tokenizer.to_str())


def from_json(text: str) -> Tokenizer:
    """Rebuild a tokenizer from its :meth:`Tokenizer.to_json`, or from the text of a ``tokenizer.json``.

    Example:
        >>> from_json(ByteTokenizer().to_json()).vocab_size
        256
    """
    return ByteTokenizer() if text == ByteTokenizer().to_json() else BPETokenizer(text)


def from_file(path: str) -> Tokenizer:
    """Read a ``tokenizer.json``."""
    try:
        return BPETokenizer(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"expected tokenizer to be 'bytes', 'bpe', or the path of a tokenizer.json, got {path!r}: {error}"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """Map the printable characters that byte-level BPE writes for bytes back to the bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
