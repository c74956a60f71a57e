"""The data module for sequence to sequence: pairs of texts in, padded batches out."""

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics.text import CHRFScore, SacreBLEUScore

from lit_transformer.data.augmentation.augmenter import Augmentation
from lit_transformer.data.baselines import Baseline, unigram_loss
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.tables.limits import Encoded
from lit_transformer.data.tables.padded import TextPairs
from lit_transformer.data.tables.records import Records, stratified
from lit_transformer.data.tables.table_data import TableData
from lit_transformer.data.text import corpus
from lit_transformer.data.text.functions import docstrings
from lit_transformer.data.text.splits import split_documents

_SCORED = 128  # chrF takes some 25 milliseconds a pair


class SequencePairData(TableData):
    """Texts, and what is to be made of each.

    Without ``files`` the sources are the functions of Python's standard library that have a docstring, without it, and
    the targets the first lines of the docstrings, split by file. Files are tables with a column of each; what has no
    files of its own is held out of ``files`` at random. Order, position and resumption are those of
    :class:`~lit_transformer.data.LanguageModelingData`.

    Args:
        files: Paths or globs of CSV, TSV, JSON lines, or with the ``hf`` extra Parquet; the embedded corpus if
            ``None``.
        val_files: Validation pairs of their own; if ``None``, ``val_fraction`` of ``files`` is held out.
        test_files: Likewise.
        predict_files: What ``predict`` reads, of which only the sources are needed; if ``None``, the test pairs.
        dataset: In place of ``files``: ``OWNER/NAME`` on the hub, or a folder, as the hub has it or as ``save_to_disk``
            of Hugging Face's ``datasets`` writes it.
        dataset_config: Which of its configurations.
        dataset_splits: The names of its splits for ``train``, ``validation`` and ``test``; by default these, and what
            there is not is held out.
        source_column: Name of the column with the source.
        target_column: Name of the column with the target.
        weight_column: Name of a column with how much a pair counts in training; in evaluation all count alike.
        val_fraction: Fraction held out for validation.
        test_fraction: Fraction held out for test.
        tokenizer: ``"bytes"``, ``"bpe"`` or ``"unigram"`` (trained on sources and targets of training), the path of a
            byte-level ``tokenizer.json``, or a folder or name of a Hugging Face tokenizer.
        bpe_vocab_size: Tokens to learn when ``tokenizer`` is ``"bpe"`` or ``"unigram"``.
        max_length: Tokens of the longest source.
        max_target_length: Tokens of the longest target, the one that ends it counted.
        too_long: ``"truncate"`` cuts longer ones off, how many is reported; ``"refuse"`` counts them as bad records.
        max_bad_records: How many records that cannot be used may be left out, over all files; they are reported.
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
        cache_dir: Folder for token ids; by default ``lit-transformer`` in the user's cache folder.

    Shapes:
        See :class:`TextPairs`.

    Raises:
        UsageError: If an argument is out of range; when something is read, if a file or data set cannot be, a column
            is missing, there are more bad records than allowed (of another width than the header, not UTF-8, without a
            value, too long), or a split is empty; if a checkpoint has another tokenizer.

    State: position, excluded samples, and what they refer to: seed, a digest of the tokens, weights, and the tokenizer,
    by which other pairs are evaluated when a checkpoint is.

    Example:
        >>> SequencePairData(tokenizer="bpe", bpe_vocab_size=2048).vocab_size
        2048
    """

    columns = "source_column", "target_column"
    rows = "pairs"

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_splits: dict[str, str] | None = None,
        source_column: str = "source",
        target_column: str = "target",
        weight_column: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 4096,
        max_length: int = 256,
        max_target_length: int = 64,
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
        self._begin(augmentations, max_target_length=2)
        self.max_target_length = max_target_length

    @property
    def eos_id(self) -> int:
        """The token that ends a target."""
        return self.encoder.eos_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        return self.encoder.decode(ids)

    def baselines(self) -> list[Baseline]:
        """What guessing by frequency, and writing the most frequent target for the first 128 sources, score."""
        self._require_setup()
        counts = [self._splits[name].targets.counts(self.vocab_size) for name in ("train", "validation")]
        common = Counter(self.samples["train"].targets).most_common(1)[0][0]
        wanted = [[target] for target in self.samples["validation"].targets[:_SCORED]]
        scores = {"bleu": SacreBLEUScore(), "chrf": CHRFScore()}
        name = f"always {common!r}"
        return [
            Baseline("loss", "guessing tokens by their frequency", unigram_loss(*counts)),
            *(Baseline(key, name, float(score([common] * len(wanted), wanted))) for key, score in scores.items()),
        ]

    def _embedded(self) -> dict[str, Records]:
        documents = corpus.read(corpus.standard_library(), leave_out_others=True)
        splits = split_documents(documents, self.fractions)
        return {name: Records.of(docstrings(part), ("docstring", name)) for name, part in splits.items()}

    def _hold_out(self, records: Records, fractions: dict[str, float]) -> dict[str, NDArray[np.int64]]:
        return stratified(["all"] * len(records), fractions, self._stream.seed)

    def _texts(self, records: Records) -> Iterable[str]:
        return (text for pair in records for text in pair)

    def _encode(self, records: Records) -> dict[str, Encoded]:
        found = {"sources": self._tokens(self.encoder, records.sources, "max_length")}
        if records.targets:
            ended = partial(self.encoder.ended, max_length=self.max_target_length)
            found["targets"] = self._tokens(ended, records.targets, "max_target_length")
        return found

    def _samples(self, name: str, records: Records, tokens: list[Ragged], options: dict[str, Any]) -> TextPairs:
        sources, targets = tokens
        return TextPairs(name, sources, targets, self.encoder.pad_id, **options)
