"""Tokenised text, written once and memory-mapped from then on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_transformer.data.text import corpus
from lit_transformer.data.text.array_file import ArrayFile
from lit_transformer.data.text.cached_folder import cached_folder
from lit_transformer.data.text.excerpt import Excerpt
from lit_transformer.data.text.progress import Progress
from lit_transformer.data.text.splits import split_documents
from lit_transformer.data.tokenizer import TRAINED, ByteTokenizer, Tokenizer, from_file, from_json
from lit_transformer.errors import UsageError

Excerpts = dict[str, Excerpt]
"""Where the texts are, by name, in order."""

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
    max_bad_records: int = 0

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

    def documents(self, paths: dict[str, list[Path]]) -> tuple[dict[str, Excerpts], list[str]]:
        """Check the files, and hold out of the training documents what has no files of its own.

        Returns:
            The documents of each split, and what is wrong with each file that is left out.
        """
        given: dict[str, Excerpts] = {}
        bad: list[str] = []
        for split, files in paths.items():
            # Nobody can be asked to convert a file of Python's own, or wants to hear of it.
            pythons = self.files is None and split == "train"
            given[split], others = corpus.check(files, inf if pythons else self.max_bad_records - len(bad))
            bad += [] if pythons else others
        fractions = {"validation": self.val_fraction, "test": self.test_fraction}
        held_out = {split: fraction for split, fraction in fractions.items() if split not in given}
        return given | split_documents(given["train"], held_out), bad

    def build_tokenizer(self, training: Excerpts) -> Tokenizer:
        """Make, train or load the tokenizer."""
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        if self.tokenizer not in TRAINED:
            return from_file(self.tokenizer)
        with Progress("learning tokens", sum(map(len, training.values()))) as progress:
            pieces = (piece for document in training.values() for piece in document.pieces())
            return TRAINED[self.tokenizer].train(progress.over(pieces), self.bpe_vocab_size)

    def key(self, paths: dict[str, list[Path]]) -> str:
        """Return a name for the outcome, from settings, tokenizer, and each file's path, size and modification time."""
        files = {split: [_stamp(path) for path in found] for split, found in paths.items()}
        if self.tokenizer in ("bytes", *TRAINED):
            tokenizer = [self.tokenizer, self.bpe_vocab_size]
        else:
            tokenizer = [hashlib.sha256(from_file(self.tokenizer).to_json().encode()).hexdigest()]
        description = [_FORMAT, files, self.val_fraction, self.test_fraction, tokenizer, self.max_bad_records]
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
    bad_records: int


def prepare(recipe: Recipe, cache_dir: str | None = None) -> Prepared:
    """Return the tokens of a recipe, tokenising only what the cache does not have.

    A folder appears in the cache complete or not at all, whoever is interrupted, and whoever else is at it. It may be
    deleted at any time.

    Args:
        recipe: What to prepare.
        cache_dir: Where to keep it; by default ``lit-transformer`` in the user's cache folder.

    Raises:
        UsageError: If the text or the tokenizer cannot be used, or a file changes meanwhile.

    Cost: a first start reads the text two times, three to train a tokenizer, and holds a few MiB of it, and each
    different word while a tokenizer is trained; a later start reads the size and time of each file, and no text.
    """
    paths = recipe.paths()
    key = recipe.key(paths)

    def write(folder: Path) -> None:
        _write(recipe, paths, folder)
        if recipe.key(paths) != key:
            raise UsageError("expected files that stay as they are, got one that changed meanwhile: start again")

    folder = cached_folder(cache_dir, key, write)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    splits = {name: Split(**split) for name, split in about["splits"].items()}
    return Prepared(folder, about["corpus_hash"], from_json(about["tokenizer"]), splits, about["bad_records"])


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _write(recipe: Recipe, paths: dict[str, list[Path]], folder: Path) -> None:
    splits, bad = recipe.documents(paths)
    if bad:
        rank_zero_warn(f"{len(bad)} bad file(s) left out, as max_bad_records allows. The first: {bad[0]}")
    tokenizer = recipe.build_tokenizer(splits["train"])
    digest = hashlib.sha256()
    sizes = {name: sum(map(len, documents.values())) for name, documents in splits.items()}
    about: dict[str, Any] = {"splits": {}, "tokenizer": tokenizer.to_json(), "bad_records": len(bad)}
    with Progress("tokenising", sum(sizes.values())) as progress:
        for name, documents in splits.items():
            tokens = _encode(name, documents, tokenizer, folder, digest.update, progress)
            about["splits"][name] = asdict(Split(len(documents), sizes[name], tokens))
    about["corpus_hash"] = digest.hexdigest()
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _encode(
    name: str,
    documents: Excerpts,
    tokenizer: Tokenizer,
    folder: Path,
    add_to_hash: Callable[[bytes], None],
    progress: Progress,
) -> int:
    """Write the tokens of a split, each document ended, and where each begins; return how many tokens there are."""
    starts = [0]
    end = np.array([tokenizer.eos_id])
    with ArrayFile(folder / f"{name}.npy", np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32) as file:
        for document, text in documents.items():
            add_to_hash(f"{name}\0{document}\0{len(text)}\0".encode())
            for piece in progress.over(text.pieces()):
                add_to_hash(piece.encode())
                file.append(tokenizer.encode(piece))
            file.append(end)
            starts.append(file.length)
    np.save(folder / f"{name}.documents.npy", np.array(starts, dtype=np.int64))
    return file.length
