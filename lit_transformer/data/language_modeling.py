"""The data module for language modelling: text in, batches of token blocks out."""

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_transformer.data.baselines import Baseline, unigram_loss
from lit_transformer.data.batching.loader import Blocks, Samples
from lit_transformer.data.batching.packed import PackedBlocks
from lit_transformer.data.resumable import ResumableData
from lit_transformer.data.text.cache import Prepared, Recipe, prepare
from lit_transformer.data.tokenizer import TRAINED, ByteTokenizer, Tokenizer, from_file
from lit_transformer.errors import UsageError


class LanguageModelingData(ResumableData):
    """Text as blocks of tokens, for predicting the next one.

    Without ``files`` the text is the source of Python's standard library, which every machine that runs this has; it
    differs a little from one Python version to the next, and ``corpus_hash`` tells. Documents are joined by an
    end-of-document token and cut into blocks. Validation and test text is held out by file, or by position if there
    are fewer than twenty files.

    Training samples come from one endless stream whose order is a function of ``seed`` alone, one permutation of the
    blocks after another. The position in it counts the samples handed out to all ranks, so a run that is resumed, with
    the same number of devices or another, continues with the very next sample. An epoch is as many batches as fit into
    one permutation; what is left over comes first in the next epoch.

    Args:
        files: Paths or globs of UTF-8 text; the embedded corpus if ``None``. What ``val_files`` or ``test_files`` also
            name is not trained on.
        val_files: Validation text of its own; if ``None``, ``val_fraction`` of ``files`` is held out.
        test_files: Test text of its own; if ``None``, ``test_fraction`` of ``files`` is held out.
        val_fraction: Fraction of the bytes held out for validation.
        test_fraction: Fraction of the bytes held out for test.
        tokenizer: ``"bytes"``, ``"bpe"`` or ``"unigram"`` (trained on the training text), the path of a
            ``tokenizer.json``, or the folder or name of a Hugging Face tokenizer, if these are byte-level.
        bpe_vocab_size: Tokens to learn when ``tokenizer`` is ``"bpe"`` or ``"unigram"``.
        block_size: Tokens in a sample.
        packing: Blocks of whole documents instead, none of which sees another; those longer than a block are cut into
            pieces. For models that take ``document_ids``: ours, and causal ones of Hugging Face.
        batch_size: Samples in a batch of one device.
        num_workers: Loader processes; 0 is fastest here, since reading a block costs next to nothing.
        prefetch_factor: Batches each worker reads ahead.
        persistent_workers: Keep workers over epochs.
        pin_memory: Page-locked batches; if ``None``, when training on CUDA.
        seed: Seed of the sample order.
        cache_dir: Folder for tokenised text; by default ``lit-transformer`` in the user's cache folder.
        max_bad_records: How many files that are binary, not UTF-8 or unreadable are left out, and counted, instead of
            refused.

    Shapes:
        A batch is a dict of int64 tensors: ``input_ids`` and ``targets`` (the same, one token later) of
        ``(batch_size, block_size)``, and ``sample_ids`` of ``(batch_size,)``. With ``packing`` see
        :class:`~lit_transformer.data.batching.packed.PackedBlocks`.

    Raises:
        UsageError: If an argument is out of range, or at setup if the text cannot be used.

    State: position, excluded samples, and what they refer to: seed, block size, packing, corpus hash and tokenizer.

    Cost: some 30 microseconds a batch without workers; the first start tokenises, in a few MiB of memory however much
    text there is, later ones map the cache.

    Example:
        >>> data = LanguageModelingData(block_size=128, batch_size=8)
        >>> data.vocab_size, data.tokens_per_batch
        (256, 1024)
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 4096,
        block_size: int = 256,
        packing: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory: bool | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        max_bad_records: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        # Lightning's own look at the frame leaves a cycle that keeps every caller's variables, loader workers too.
        self.save_hyperparameters(logger=False, frame=inspect.currentframe())
        self._check_settings(bpe_vocab_size=257, block_size=1, max_bad_records=0)
        self.block_size, self.packing = block_size, packing
        self._recipe = Recipe(
            files, val_files, test_files, val_fraction, test_fraction, tokenizer, bpe_vocab_size, max_bad_records
        )
        self._tokenizer = _untrained(tokenizer)
        self._prepared: Prepared | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; known before any text is read."""
        return self._recipe.bpe_vocab_size if self._tokenizer is None else self._tokenizer.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; one that is trained on the text exists after setup."""
        return self._ready().tokenizer if self._tokenizer is None else self._tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text each token stands for, ``(vocab_size,)``, to turn a loss into bits per byte."""
        return self.tokenizer.token_bytes

    @property
    def corpus_hash(self) -> str:
        """SHA-256 of the text as it is split; after setup."""
        return self._ready().corpus_hash

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in a batch of one device."""
        return self.batch_size * self.block_size

    def baselines(self) -> list[Baseline]:
        """What guessing by frequency scores; after setup."""
        self._ready()
        counts = [self._splits[name].counts(self.vocab_size) for name in ("train", "validation")]
        return [Baseline("loss", "guessing tokens by their frequency", unigram_loss(*counts))]

    def describe(self) -> str:
        """Return what a person wants to know about the data, in two lines; after setup."""
        prepared = self._ready()
        text = "the standard library of Python" if self._recipe.files is None else "files"
        splits = "; ".join(
            f"{name} {split.files:,} files, {split.bytes:,} bytes, {split.tokens:,} tokens"
            for name, split in prepared.splits.items()
        )
        left_out = f"; {prepared.bad_records:,} bad files left out" if prepared.bad_records else ""
        filled = f" of whole documents, {self._splits['train'].filled:.1%} of them text" if self.packing else ""
        return (
            f"{text}, sha256 {prepared.corpus_hash[:12]}, tokenizer {self._recipe.tokenizer} of {self.vocab_size:,}, "
            f"blocks of {self.block_size}{filled}\n{splits}{left_out}"
        )

    def prepare_data(self) -> None:
        """Fill the cache."""
        prepare(self._recipe, self.hparams["cache_dir"])

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens; a second call changes nothing."""
        if self._prepared is None:
            prepared = prepare(self._recipe, self.hparams["cache_dir"])
            for name, split in prepared.splits.items():
                if not split.tokens or (split.tokens <= self.block_size and not self.packing):
                    least = "some" if self.packing else f"at least block_size + 1 = {self.block_size + 1}"
                    raise UsageError(
                        f"expected {least} tokens of {name} text, got {split.tokens} ({split.bytes} bytes). Give more "
                        "text, hold out another fraction, or lower block_size."
                    )
                self._splits[name] = self._samples(prepared.folder / f"{name}.npy")
            self._prepared = prepared
        self._stream_over(self._splits["train"])

    def _samples(self, path: Path) -> Samples:
        return self._blocks(path)

    def _blocks(self, path: Path) -> Blocks:
        return (PackedBlocks if self.packing else Blocks)(path, self.block_size)

    def _ready(self) -> Prepared:
        self._require_setup()
        assert self._prepared is not None
        return self._prepared

    def _meaning(self) -> dict[str, Any]:
        return {
            "seed": self._stream.seed,
            "block_size": self.block_size,
            "packing": self.packing,
            "corpus_hash": self.corpus_hash,
            "tokenizer": self.tokenizer.to_json(),
        }


def _untrained(tokenizer: str) -> Tokenizer | None:
    if tokenizer == "bytes":
        return ByteTokenizer()
    return None if tokenizer in TRAINED else from_file(tokenizer)
