"""The data module for classification: texts and their classes in, padded batches out."""

import hashlib
import inspect
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lit_transformer.data import corpus
from lit_transformer.data.augment import Augmentation, Augmenter, checked
from lit_transformer.data.augment_specs import say
from lit_transformer.data.baselines import Baseline, bag_of_words
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.functions import Sample, functions, largest_packages, split_packages
from lit_transformer.data.loader import Batch, Samples
from lit_transformer.data.order import Ids
from lit_transformer.data.ragged import Ragged
from lit_transformer.data.resumable import ResumableData
from lit_transformer.data.tables import read_tables
from lit_transformer.data.token_dropout import check_rate, drop_tokens
from lit_transformer.errors import UsageError

_PACKAGES = 8


class LabelledTexts(Samples):
    """Token ids and a class each, padded on the right to the longest of a batch.

    Shapes:
        A batch is ``input_ids`` and ``attention_mask`` of ``(batch, longest)``, ``targets`` and ``sample_ids`` of
        ``(batch,)``, int64.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[Sequence[int]],
        targets: Sequence[int],
        pad_id: int,
        token_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name)
        self.token_dropout, self.seed = token_dropout, seed
        self.augmenter: Augmenter | None = None  # of the training samples, if there are augmentations
        self.pad_id = pad_id
        self.targets = np.array(targets, dtype=np.int64)
        self.texts = Ragged(tokens)

    def augment(self, batch: Batch, draws: Ids) -> Batch:
        """Change the texts, and take some tokens out."""
        if self.augmenter is not None:
            batch = self.augmenter(batch, draws)
        return drop_tokens(batch, draws, self.token_dropout, self.seed, self.pad_id)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, ids: Ids) -> Batch:
        input_ids, attention_mask = self.texts.pad(ids, self.pad_id)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "targets": torch.from_numpy(self.targets[ids]),
            "sample_ids": torch.tensor(ids),
        }

    def lengths(self) -> Ids:
        """Tokens of each text, ``(n, 1)``."""
        return self.texts.lengths()[:, None]

    def digest(self) -> str:
        """SHA-256 of tokens and classes."""
        return hashlib.sha256(self.texts.digest().encode() + self.targets.tobytes()).hexdigest()


class ClassificationData(ResumableData):
    """Texts, each of one class.

    Without ``files`` the texts are the functions of the eight largest packages of Python's standard library, and the
    class is the package; each package is split by file. Files are tables with a column of texts and one of classes;
    what has no files of its own is held out of ``files``, the same fraction of each class. Order, position and
    resumption are those of :class:`~lit_transformer.data.LanguageModelingData`.

    Args:
        files: Paths or globs of CSV, TSV, JSON lines or Parquet; the embedded corpus if ``None``. Needs the ``hf``
            extra.
        val_files: Validation samples of their own; if ``None``, ``val_fraction`` of ``files`` is held out.
        test_files: Likewise.
        text_column: Name of the column with the text.
        label_column: Name of the column with the class.
        val_fraction: Fraction held out for validation.
        test_fraction: Fraction held out for test.
        tokenizer: ``"bytes"``, ``"bpe"`` (trained on the training texts), the path of a byte-level
            ``tokenizer.json``, or a folder or name of a Hugging Face tokenizer, which adds the special tokens that its
            model expects.
        bpe_vocab_size: Tokens to learn when ``tokenizer`` is ``"bpe"``.
        max_length: Longer texts are cut off; how many is reported.
        batch_size: Samples in a batch of one device.
        group_by_length: Put samples of like length into a batch, which saves most of the padding. A run is then resumed
            with the same global batch size only.
        max_tokens: Likewise, but fill a training batch of one device up to so many tokens, padding counted; then
            ``batch_size`` is that of evaluation alone. Of several devices, one may have a sample more.
        num_workers: Loader processes; 0 is fastest here.
        prefetch_factor: Batches each worker reads ahead.
        persistent_workers: Keep workers over epochs.
        pin_memory: Page-locked batches; if ``None``, when training on CUDA.
        token_dropout: Share of the texts' tokens that are taken out in training, others each time.
        augmentations: What makes another text of a text each time it is trained on, one after the other: see
            :class:`~lit_transformer.data.Augmentation`. Batches are grouped by the lengths before it, so that one of
            ``max_tokens`` may have more.
        seed: Seed of the sample order, of what is held out, of what is taken out, and of what augmentations draw.

    Shapes:
        See :class:`LabelledTexts`.

    Raises:
        UsageError: If an argument is out of range; at setup, if a file cannot be read, a column is missing, a text or
            class is empty, a class of the held-out data does not occur in training, or there is only one class.

    State: position, excluded samples, and what they refer to: seed, and a digest of tokens and classes.

    Example:
        >>> data = ClassificationData(max_length=64, batch_size=4)
        >>> len(data.labels), data.vocab_size
        (8, 256)
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 4096,
        max_length: int = 256,
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
        self._check_settings(max_length=1, max_tokens=1, bpe_vocab_size=257)
        self.max_length = max_length
        check_rate(token_dropout)
        self._augmentations, self.hparams["augmentations"] = checked(augmentations)
        self.fractions = {"validation": val_fraction, "test": test_fraction}
        self._splits: dict[str, LabelledTexts] = {}
        self._digest = ""
        self._cut = 0

    @cached_property
    def encoder(self) -> Encoder:
        """Texts to token ids."""
        return Encoder(self.hparams["tokenizer"], self.max_length, self.hparams["bpe_vocab_size"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.encoder.vocab_size

    @cached_property
    def labels(self) -> list[str]:
        """The classes of the training samples, in alphabetical order."""
        found = sorted({label for _, label in self._samples["train"]})
        if len(found) < 2:
            raise UsageError(f"expected at least two classes, got {', '.join(found)}")
        return found

    def class_counts(self) -> dict[str, int]:
        """How many training samples each class has."""
        counts = Counter(label for _, label in self._samples["train"])
        return {label: counts[label] for label in self.labels}

    @cached_property
    def _samples(self) -> dict[str, list[Sample]]:
        if self.hparams["files"] is None:
            documents = corpus.read(corpus.standard_library(), leave_out_others=True)
            packages = largest_packages(documents, _PACKAGES)
            splits = split_packages(documents, packages, self.fractions)
            return {name: functions(part, packages) for name, part in splits.items()}
        found = read_tables(self.hparams, "text_column", "label_column")
        held_out = {name: fraction for name, fraction in self.fractions.items() if name not in found}
        return found | stratified(found["train"], held_out, self._stream.seed)

    def baselines(self) -> list[Baseline]:
        """What the most frequent class, and a bag of words, score; after setup."""
        self._require_setup()
        train, validation = self._splits["train"], self._splits["validation"]
        common = np.bincount(train.targets).argmax()
        guessed = bag_of_words(train.texts, train.targets, validation.texts, self.vocab_size)
        return [
            Baseline("accuracy", "the most frequent class", float((validation.targets == common).mean())),
            Baseline("accuracy", "a bag of words", float((validation.targets == guessed).mean())),
        ]

    def describe(self) -> str:
        """Return what a person wants to know about the data; after setup."""
        self._require_setup()
        source = "functions of the standard library of Python" if self.hparams["files"] is None else "files"
        sizes = ", ".join(f"{name} {len(texts):,}" for name, texts in self._splits.items())
        cut = f"; {self._cut:,} texts cut off at {self.max_length} tokens" if self._cut else ""
        return f"{source}, {len(self.labels)} classes, samples: {sizes}{cut}\n{self._padding()}"

    def setup(self, stage: str | None = None) -> None:
        """Tokenise; a second call changes nothing."""
        if not self._splits:
            dropout = self.hparams["token_dropout"]
            number = {label: i for i, label in enumerate(self.labels)}
            self.encoder.train(text for text, _ in self._samples["train"])
            for name, samples in self._samples.items():
                if not samples:
                    raise UsageError(f"expected {name} samples, got none: give more, or hold out another fraction")
                if unseen := sorted({label for _, label in samples} - number.keys()):
                    raise UsageError(f"the {name} samples have the class {unseen[0]!r}, which training has not")
                tokens, cut = self.encoder([text for text, _ in samples])
                self._cut += cut
                targets = [number[label] for _, label in samples]
                self._splits[name] = texts = LabelledTexts(
                    name, tokens, targets, self.encoder.pad_id, dropout if name == "train" else 0.0, self._stream.seed
                )
                if name == "train":
                    self._digest = texts.digest()
                    if self._augmentations:
                        training = [text for text, _ in samples]
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
        }


def stratified(samples: list[Sample], fractions: dict[str, float], seed: int) -> dict[str, list[Sample]]:
    """Hold out the same fraction of each class, rounded, at random; the rest is for training.

    Example:
        >>> parts = stratified([(str(i), "ab"[i % 2]) for i in range(10)], {"test": 0.4}, seed=0)
        >>> [len(part) for part in parts.values()], sorted(label for _, label in parts["test"])
        ([6, 4], ['a', 'a', 'b', 'b'])
    """
    by_class: dict[str, list[int]] = {}
    for i, (_, label) in enumerate(samples):
        by_class.setdefault(label, []).append(i)
    generator = np.random.default_rng(seed)
    places = {name: set[int]() for name in ("train", *fractions)}
    for members in by_class.values():
        order = generator.permutation(members).tolist()
        for name, fraction in fractions.items():
            count = round(fraction * len(members))
            places[name].update(order[:count])
            order = order[count:]
        places["train"].update(order)
    return {name: [samples[i] for i in sorted(chosen)] for name, chosen in places.items()}
