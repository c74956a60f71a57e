"""Tokenised text, written once and memory-mapped from then on."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lit_transformer.data import corpus
from lit_transformer.data.corpus import Documents
from lit_transformer.data.splits import split_documents
from lit_transformer.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, from_file, from_json
from lit_transformer.errors import UsageError

_FORMAT = 2  # raised when what is written changes, so that older folders are left alone


@dataclass(frozen=True)
class Recipe:
    """What the tokens depend on: the texts, and how they are split and tokenised."""

    files: str | list[str] | None
    val_files: str | list[str] | None
    test_files: str | list[str] | None
    val_fraction: float
    test_fraction: float
    tokenizer: str
    bpe_vocab_size: int

    def paths(self) -> dict[str, list[Path]]:
        """Find the files; splits without files of their own are absent, and no split's file is trained on."""
        paths = {"train": corpus.standard_library() if self.files is None else corpus.find(self.files)}
        if self.val_files is not None:
            paths["validation"] = corpus.find(self.val_files)
        if self.test_files is not None:
            paths["test"] = corpus.find(self.test_files)
        held_out = {path for split in ("validation", "test") for path in paths.get(split, [])}
        paths["train"] = [path for path in paths["train"] if path not in held_out]
        if not paths["train"]:
            raise UsageError(
                f"expected text to train on, got {self.files!r}, all of it validation or test text as well"
            )
        return paths

    def documents(self, paths: dict[str, list[Path]]) -> dict[str, Documents]:
        """Read the files, and hold out of the training documents what has no files of its own."""
        # Nobody can be asked to convert a file of Python's own.
        given = {split: corpus.read(files, self.files is None and split == "train") for split, files in paths.items()}
        fractions = {"validation": self.val_fraction, "test": self.test_fraction}
        held_out = {split: fraction for split, fraction in fractions.items() if split not in given}
        return given | split_documents(given["train"], held_out)

    def build_tokenizer(self, training: Documents) -> Tokenizer:
        """Make, train or load the tokenizer."""
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        if self.tokenizer == "bpe":
            return BPETokenizer.train((content.decode() for content in training.values()), self.bpe_vocab_size)
        return from_file(self.tokenizer)

    def key(self, paths: dict[str, list[Path]]) -> str:
        """Return a name for the outcome, from the settings and each file's path, size and modification time."""
        files = {split: [_stamp(path) for path in found] for split, found in paths.items()}
        if self.tokenizer in ("bytes", "bpe"):
            tokenizer = [self.tokenizer, self.bpe_vocab_size]
        else:
            tokenizer = _stamp(Path(self.tokenizer).expanduser().absolute())
        description = [_FORMAT, files, self.val_fraction, self.test_fraction, tokenizer]
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Split:
    """How much text a split holds."""

    files: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Prepared:
    """A folder with the tokens of each split, and what is known about them.

    ``<split>.npy`` are the ids of all documents, each ended by the end-of-document token; ``<split>.documents.npy`` is
    where in it each document begins, and at last its length: int64, one more than there are documents.
    """

    folder: Path
    corpus_hash: str
    tokenizer: Tokenizer
    splits: dict[str, Split]


def prepare(recipe: Recipe, cache_dir: str | None = None) -> Prepared:
    """Return the tokens of a recipe, tokenising only what the cache does not have.

    A folder appears in the cache complete or not at all, whoever is interrupted, and whoever else is at it. It may be
    deleted at any time.

    Args:
        recipe: What to prepare.
        cache_dir: Where to keep it; by default ``lit-transformer`` in the user's cache folder.

    Raises:
        UsageError: If the text or the tokenizer cannot be used.

    Cost: a first start holds the text in memory; a later one reads the size and time of each file, and no text.
    """
    paths = recipe.paths()
    root = _root(cache_dir)
    folder = root / recipe.key(paths)
    if not folder.exists():
        unfinished = root / f".{uuid.uuid4().hex}"
        unfinished.mkdir()
        try:
            _write(recipe, paths, unfinished)
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    splits = {name: Split(**split) for name, split in about["splits"].items()}
    return Prepared(folder, about["corpus_hash"], from_json(about["tokenizer"]), splits)


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        root = Path(cache_dir).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-transformer"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        user = getattr(os, "getuid", int)()
        fallback = Path(tempfile.gettempdir(), f"lit-transformer-{user}")
        rank_zero_warn(f"The cache folder cannot be written ({error}); using {fallback}. Set cache_dir to choose one.")
        fallback.mkdir(exist_ok=True)
        return fallback


def _write(recipe: Recipe, paths: dict[str, list[Path]], folder: Path) -> None:
    splits = recipe.documents(paths)
    tokenizer = recipe.build_tokenizer(splits["train"])
    sizes = {}
    for name, documents in splits.items():
        tokens, starts = _encode(documents, tokenizer)
        np.save(folder / f"{name}.npy", tokens)
        np.save(folder / f"{name}.documents.npy", starts)
        size = sum(map(len, documents.values()))
        sizes[name] = asdict(Split(files=len(documents), bytes=size, tokens=len(tokens)))
    about = {"corpus_hash": corpus.content_hash(splits), "tokenizer": tokenizer.to_json(), "splits": sizes}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _encode(documents: Documents, tokenizer: Tokenizer) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return all documents as one array, each followed by the end-of-document token, and where each begins."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([tokenizer.eos_id], dtype=dtype)
    parts = [np.empty(0, dtype=dtype)]
    parts += [np.append(tokenizer.encode(content.decode()).astype(dtype), end) for content in documents.values()]
    return np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same outcome
            raise
