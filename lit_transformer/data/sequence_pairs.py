"""The data module for sequence to sequence: pairs of texts in, padded batches out."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torchmetrics.text import CHRFScore, SacreBLEUScore

from lit_transformer.data import corpus
from lit_transformer.data.augment import Augmentation, Augmenter, checked
from lit_transformer.data.augment_specs import say
from lit_transformer.data.baselines import Baseline, unigram_loss
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.functions import Sample, docstrings
from lit_transformer.data.loader import Batch, Samples
from lit_transformer.data.order import Ids
from lit_transformer.data.ragged import Ragged
from lit_transformer.data.resumable import ResumableData
from lit_transformer.data.splits import split_documents
from lit_transformer.data.tables import read_tables
from lit_transformer.data.token_dropout import check_rate, drop_tokens
from lit_transformer.errors import UsageError
from lit_transformer.objectives import IGNORED

_SCORED = 128  # chrF takes some 25 milliseconds a pair


class TextPairs(Samples):
    """Token ids of a source and of a target each, padded on the right to the longest of a batch.

    Shapes:
        A batch is ``input_ids`` and ``attention_mask`` of ``(batch, longest source)``, ``targets`` of ``(batch, longest
        target)``, -100 where there is none, and ``sample_ids`` of ``(batch,)``, int64.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        pad_id: int,
        token_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name)
        self.token_dropout, self.seed = token_dropout, seed
        self.augmenter: Augmenter | None = None  # of the training samples, if there are augmentations
        self.pad_id, self._n = pad_id, len(sources)
        self.sources, self.targets = Ragged(sources), Ragged(targets)

    def augment(self, batch: Batch, draws: Ids) -> Batch:
        """Change the texts, and take some tokens out."""
        if self.augmenter is not None:
            batch = self.augmenter(batch, draws)
        return drop_tokens(batch, draws, self.token_dropout, self.seed, self.pad_id)

    def __len__(self) -> int:
        return self._n

    def __getitems__(self, ids: Ids) -> Batch:
        input_ids, attention_mask = self.sources.pad(ids, self.pad_id)
        targets, _ = self.targets.pad(ids, IGNORED)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "targets": torch.from_numpy(targets),
            "sample_ids": torch.tensor(ids),
        }

    def lengths(self) -> Ids:
        """Tokens of each source and target, ``(n, 2)``."""
        return np.stack([self.sources.lengths(), self.targets.lengths()], axis=1)

    def digest(self) -> str:
        """SHA-256 of all tokens."""
        return hashlib.sha256(f"{self.sources.digest()} {self.targets.digest()}".encode()).hexdigest()


class SequencePairData(ResumableData):
    """Texts, and what is to be made of each.

    Without ``files`` the sources are the functions of Python's standard library that have a docstring, without it, and
    the targets the first lines of the docstrings, split by file. Files are tables with a column of each; what has no
    files of its own is held out of ``files`` at random. Order, position and resumption are those of
    :class:`~lit_transformer.data.LanguageModelingData`.

    Args:
        files: Paths or globs of CSV, TSV, JSON lines or Parquet; the embedded corpus if ``None``. Needs the ``hf``
            extra.
        val_files: Validation pairs of their own; if ``None``, ``val_fraction`` of ``files`` is held out.
        test_files: Likewise.
        source_column: Name of the column with the source.
        target_column: Name of the column with the target.
        val_fraction: Fraction held out for validation.
        test_fraction: Fraction held out for test.
        tokenizer: ``"bytes"``, ``"bpe"`` (trained on sources and targets of training), the path of a byte-level
            ``tokenizer.json``, or a folder or name of a Hugging Face tokenizer.
        bpe_vocab_size: Tokens to learn when ``tokenizer`` is ``"bpe"``.
        max_length: Longer sources are cut off; how many is reported.
        max_target_length: Longer targets are cut off, the token that ends them counted; how many is reported.
        batch_size: Pairs in a batch of one device.
        group_by_length: Put pairs of like length into a batch, which saves most of the padding. A run is then resumed
            with the same global batch size only.
        max_tokens: Likewise, but fill a training batch of one device up to so many tokens, padding counted; then
            ``batch_size`` is that of evaluation alone. Of several devices, one may have a sample more.
        num_workers: Loader processes; 0 is fastest here.
        prefetch_factor: Batches each worker reads ahead.
        persistent_workers: Keep workers over epochs.
        pin_memory: Page-locked batches; if ``None``, when training on CUDA.
        token_dropout: Share of the sources' tokens that are taken out in training, others each time.
        augmentations: What makes another text of a source each time it is trained on, one after the other: see
            :class:`~lit_transformer.data.Augmentation`. Batches are grouped by the lengths before it, so that one of
            ``max_tokens`` may have more.
        seed: Seed of the sample order, of what is held out, of what is taken out, and of what augmentations draw.

    Shapes:
        See :class:`TextPairs`.

    Raises:
        UsageError: If an argument is out of range; at setup, if a file cannot be read, a column is missing or a value
            is, or a split is empty.

    State: position, excluded samples, and what they refer to: seed, a digest of the tokens, and the tokenizer.

    Example:
        >>> SequencePairData(tokenizer="bpe", bpe_vocab_size=2048).vocab_size
        2048
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        source_column: str = "source",
        target_column: str = "target",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 4096,
        max_length: int = 256,
        max_target_length: int = 64,
        batch_size: int = 32,
        group_by_length: bool = False,
        max_tokens: int | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory: bool | None = None,
        token_dropout: float = 0.0,
        augmentations: list[Augmentation] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, group_by_length, max_tokens)
        # As in LanguageModelingData: Lightning's own look at the frame leaves a cycle.
        self.save_hyperparameters(logger=False, ignore="augmentations", frame=inspect.currentframe())
        self._check_settings(max_length=1, max_tokens=1, max_target_length=2, bpe_vocab_size=257)
        self.max_length, self.max_target_length = max_length, max_target_length
        check_rate(token_dropout)
        self._augmentations, self.hparams["augmentations"] = checked(augmentations)
        self.fractions = {"validation": val_fraction, "test": test_fraction}
        self._splits: dict[str, TextPairs] = {}
        self._digest = ""
        self._cut = {"sources": 0, "targets": 0}

    @cached_property
    def encoder(self) -> Encoder:
        """Sources to token ids."""
        return Encoder(self.hparams["tokenizer"], self.max_length, self.hparams["bpe_vocab_size"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.encoder.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends a target."""
        return self.encoder.eos_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.encoder.decode(ids)

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """The pairs of each split."""
        if self.hparams["files"] is None:
            documents = corpus.read(corpus.standard_library(), leave_out_others=True)
            return {name: docstrings(part) for name, part in split_documents(documents, self.fractions).items()}
        found = read_tables(self.hparams, "source_column", "target_column")
        held_out = {name: fraction for name, fraction in self.fractions.items() if name not in found}
        return found | _held_out(found["train"], held_out, self._stream.seed)

    def baselines(self) -> list[Baseline]:
        """What guessing by frequency, and writing the most frequent target for the first 128 sources, score."""
        self._require_setup()
        counts = [self._splits[name].targets.counts(self.vocab_size) for name in ("train", "validation")]
        common = Counter(target for _, target in self.samples["train"]).most_common(1)[0][0]
        wanted = [[target] for _, target in self.samples["validation"][:_SCORED]]
        scores = {"bleu": SacreBLEUScore(), "chrf": CHRFScore()}
        name = f"always {common!r}"
        return [
            Baseline("loss", "guessing tokens by their frequency", unigram_loss(*counts)),
            *(Baseline(key, name, float(score([common] * len(wanted), wanted))) for key, score in scores.items()),
        ]

    def describe(self) -> str:
        """Return what a person wants to know about the data; after setup."""
        self._require_setup()
        source = "functions of the standard library of Python" if self.hparams["files"] is None else "files"
        sizes = ", ".join(f"{name} {len(pairs):,}" for name, pairs in self._splits.items())
        cut = ", ".join(f"{count:,} {side}" for side, count in self._cut.items() if count)
        return f"{source}, pairs: {sizes}" + (f"; cut off: {cut}" if cut else "") + f"\n{self._padding()}"

    def setup(self, stage: str | None = None) -> None:
        """Tokenise; a second call changes nothing."""
        if not self._splits:
            dropout = self.hparams["token_dropout"]
            self.encoder.train(text for pair in self.samples["train"] for text in pair)
            for name, pairs in self.samples.items():
                if not pairs:
                    raise UsageError(f"expected {name} pairs, got none: give more, or hold out another fraction")
                sources, too_long = self.encoder([source for source, _ in pairs])
                targets, targets_too_long = self.encoder.ended([target for _, target in pairs], self.max_target_length)
                self._cut["sources"] += too_long
                self._cut["targets"] += targets_too_long
                self._splits[name] = texts = TextPairs(
                    name, sources, targets, self.encoder.pad_id, dropout if name == "train" else 0.0, self._stream.seed
                )
                if name == "train":
                    self._digest = texts.digest()
                    if self._augmentations:
                        training = [source for source, _ in pairs]
                        texts.augmenter = Augmenter(self._augmentations, training, self.encoder, self._stream.seed)
        self._stream_over(self._splits["train"])
        if (augmenter := self._splits["train"].augmenter) is not None:
            augmenter.prepare(stage)

    def _meaning(self) -> dict[str, Any]:
        return {
            "seed": self._stream.seed,
            "token_dropout": self.hparams["token_dropout"],
            "augmentations": say(self.hparams["augmentations"]),
            "digest": self._digest,
            "tokenizer": self.encoder.to_json(),
        }


def _held_out(pairs: list[Sample], fractions: dict[str, float], seed: int) -> dict[str, list[Sample]]:
    """Take a fraction of the pairs out for each split, at random; the rest is for training."""
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    found = {}
    for name, fraction in fractions.items():
        count = round(fraction * len(pairs))
        found[name] = [pairs[i] for i in sorted(order[:count])]
        order = order[count:]
    return {"train": [pairs[i] for i in sorted(order)], **found}
