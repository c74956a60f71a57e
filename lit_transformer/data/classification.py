"""The data module for classification: texts and their classes in, padded batches out."""

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.augmentation.augmenter import Augmentation
from lit_transformer.data.baselines import Baseline, bag_of_words
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.tables.limits import Encoded
from lit_transformer.data.tables.padded import LabelledTexts
from lit_transformer.data.tables.records import Records, stratified
from lit_transformer.data.tables.table_data import TableData
from lit_transformer.data.text import corpus
from lit_transformer.data.text.functions import functions, largest_packages, split_packages
from lit_transformer.errors import UsageError

_PACKAGES = 8


class ClassificationData(TableData):
    """Texts, each of one class.

    Without ``files`` the texts are the functions of the eight largest packages of Python's standard library, and the
    class is the package; each package is split by file. Files are tables with a column of texts and one of classes;
    what has no files of its own is held out of ``files``, the same fraction of each class. Order, position and
    resumption are those of :class:`~lit_transformer.data.LanguageModelingData`.

    Args:
        files: Paths or globs of CSV, TSV, JSON lines, or with the ``hf`` extra Parquet; the embedded corpus if
            ``None``.
        val_files: Validation samples of their own; if ``None``, ``val_fraction`` of ``files`` is held out.
        test_files: Likewise.
        predict_files: What ``predict`` reads, of which only the texts are needed; if ``None``, the test samples.
        dataset: In place of ``files``: ``OWNER/NAME`` on the hub, or a folder, as the hub has it or as ``save_to_disk``
            of Hugging Face's ``datasets`` writes it.
        dataset_config: Which of its configurations.
        dataset_splits: The names of its splits for ``train``, ``validation`` and ``test``; by default these, and what
            there is not is held out.
        text_column: Name of the column with the text.
        label_column: Name of the column with the class.
        labels: The classes, in the order of their numbers; by default those of the training samples in alphabetical
            order.
        weight_column: Name of a column with how much a sample counts in training; in evaluation all count alike.
        class_weights: How much the samples of a class count, by its name, 1 where it is not named; or ``"balanced"``:
            their number over that of the classes and that of the samples of the class.
        val_fraction: Fraction held out for validation.
        test_fraction: Fraction held out for test.
        tokenizer: ``"bytes"``, ``"bpe"`` or ``"unigram"`` (trained on the training texts), the path of a byte-level
            ``tokenizer.json``, or a folder or name of a Hugging Face tokenizer, which adds the special tokens that its
            model expects.
        bpe_vocab_size: Tokens to learn when ``tokenizer`` is ``"bpe"`` or ``"unigram"``.
        max_length: Tokens of the longest text.
        too_long: ``"truncate"`` cuts longer ones off, how many is reported; ``"refuse"`` counts them as bad records.
        max_bad_records: How many records that cannot be used may be left out, over all files; they are reported.
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
        cache_dir: Folder for token ids; by default ``lit-transformer`` in the user's cache folder.

    Shapes:
        See :class:`LabelledTexts`.

    Raises:
        UsageError: If an argument is out of range; when something is read, if a file or data set cannot be, a column
            is missing, there are more bad records than allowed (of another width than the header, not UTF-8, without a
            value, too long), a class does not occur in training, or there is only one; if a checkpoint has another
            tokenizer or other classes.

    State: position, excluded samples, and what they refer to: seed, a digest of tokens and classes, and weights; the
    classes and the tokenizer, by which other samples are evaluated when a checkpoint is.

    Example:
        >>> data = ClassificationData(max_length=64, batch_size=4)
        >>> len(data.labels), data.vocab_size
        (8, 256)
    """

    columns = "text_column", "label_column"
    rows = "samples"

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_splits: dict[str, str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        labels: list[str] | None = None,
        weight_column: str | None = None,
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 4096,
        max_length: int = 256,
        too_long: Literal["truncate", "refuse"] = "truncate",
        max_bad_records: int = 0,
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
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed, group_by_length, max_tokens)
        # As in LanguageModelingData: Lightning's own look at the frame leaves a cycle.
        self.save_hyperparameters(logger=False, ignore="augmentations", frame=inspect.currentframe())
        self._begin(augmentations)
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise UsageError(f"labels must be two classes or more, each named once, got {', '.join(map(str, labels))}")
        _check_weights(class_weights)

    @cached_property
    def labels(self) -> list[str]:
        """The classes that are set, or those of a checkpoint, or of the training samples in alphabetical order."""
        if (given := self.hparams["labels"]) is not None:
            return list(map(str, given))  # YAML reads 0 as a number
        found = sorted(set(self._records("train").targets))
        if len(found) < 2:
            raise UsageError(f"expected at least two classes, got {', '.join(found)}")
        return found

    def class_counts(self) -> dict[str, int]:
        """How many training samples each class has."""
        counts = Counter(self._records("train").targets)
        return {label: counts[label] for label in self.labels}

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
        return f"{len(self.labels)} classes of {super().describe()}"

    def load_vocabulary(self, state: Mapping[str, Any]) -> None:
        """Likewise, and the classes."""
        super().load_vocabulary(state)
        if (saved := state.get("labels")) is None:
            return
        if (self._splits or self.hparams["labels"] is not None) and saved != self.labels:
            raise UsageError(f"the checkpoint is for the classes {saved}, and the samples are for {self.labels}")
        self.labels = saved

    def _embedded(self) -> dict[str, Records]:
        documents = corpus.read(corpus.standard_library(), leave_out_others=True)
        packages = largest_packages(documents, _PACKAGES)
        splits = split_packages(documents, packages, self.fractions)
        return {name: Records.of(functions(part, packages), ("function", name)) for name, part in splits.items()}

    def _hold_out(self, records: Records, fractions: dict[str, float]) -> dict[str, NDArray[np.int64]]:
        return stratified(records.targets, fractions, self._stream.seed)

    def _texts(self, records: Records) -> Iterable[str]:
        return records.sources

    def _encode(self, records: Records) -> dict[str, Encoded]:
        return {"texts": self._tokens(self.encoder, records.sources, "max_length")}

    def _samples(self, name: str, records: Records, tokens: list[Ragged], options: dict[str, Any]) -> LabelledTexts:
        return LabelledTexts(name, tokens[0], self._numbers(records), self.encoder.pad_id, **options)

    def _numbers(self, records: Records) -> list[int]:
        """The class of each row."""
        number = {label: i for i, label in enumerate(self.labels)}
        for i, label in enumerate(records.targets):
            if label not in number:
                set_ = "labels have" if self.hparams["labels"] is not None else "training has"
                raise UsageError(f"{records.place(i)} has the class {label!r}, which {set_} not")
        return [number[label] for label in records.targets]

    def _weights(self, records: Records) -> NDArray[np.float32] | None:
        weights, given = super()._weights(records), self.hparams["class_weights"]
        if given is None:
            return weights
        counts = Counter(records.targets)
        if given == "balanced":
            given = {label: len(records) / (len(counts) * count) for label, count in counts.items()}
        given = {str(label): weight for label, weight in given.items()}  # YAML reads 0 as a number
        if unknown := sorted(given.keys() - set(self.labels)):
            raise UsageError(f"class_weights has {unknown[0]!r}, which is no class: {', '.join(self.labels)}")
        by_class = np.array([given.get(label, 1.0) for label in records.targets], dtype=np.float32)
        return by_class if weights is None else by_class * weights

    def _meaning(self) -> dict[str, Any]:
        return super()._meaning() | {"labels": self.labels}


def _check_weights(weights: Any) -> None:
    if weights is not None and weights != "balanced" and not isinstance(weights, Mapping):
        raise UsageError(f"class_weights must be 'balanced', a weight by class, or null, got {weights!r}")
    for label, weight in weights.items() if isinstance(weights, Mapping) else ():
        if not 0 <= weight < math.inf:
            raise UsageError(f"class_weights must be at least 0, got {weight} for {label!r}")
