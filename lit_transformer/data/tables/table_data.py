"""What the data modules over tables share: splits, tokens, weights, and vocabularies that travel in checkpoints."""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info
from numpy.typing import NDArray

from lit_transformer.data.augmentation.augmenter import Augmentation, Augmenter, checked
from lit_transformer.data.augmentation.specs import say
from lit_transformer.data.batching.loader import EvaluationLoader
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.batching.token_dropout import check_rate
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.resumable import ResumableData
from lit_transformer.data.tables import hub
from lit_transformer.data.tables.limits import Encoded, within_limits
from lit_transformer.data.tables.padded import Texts
from lit_transformer.data.tables.read import Columns, read_files, read_split
from lit_transformer.data.tables.records import BadRecords, Records
from lit_transformer.data.tables.token_cache import Encode, encoded_once
from lit_transformer.errors import UsageError

_FILES = {"train": "files", "validation": "val_files", "test": "test_files", "predict": "predict_files"}


class TableData(ResumableData):
    """Texts and what is to be said of each, from tables, or embedded.

    What is needed of the rows is read when it is first asked for: in ``fit`` all at setup; in an evaluation its own
    split, after the checkpoint has brought its vocabularies. A subclass saves its hyperparameters, which its signature
    repeats because the command line reads it, and calls :meth:`_begin`.

    Attributes:
        columns: The settings that name the column of texts, and that of what is to be said.
        rows: What a person calls its rows.

    State: that of :class:`ResumableData`, and the tokenizer.
    """

    columns: ClassVar[tuple[str, str]]
    rows: ClassVar[str]

    @abstractmethod
    def _embedded(self) -> dict[str, Records]:
        """The rows where there are no files."""

    @abstractmethod
    def _hold_out(self, records: Records, fractions: dict[str, float]) -> dict[str, NDArray[np.int64]]:
        """Which rows are for training, and which for each of the splits."""

    @abstractmethod
    def _texts(self, records: Records) -> Iterable[str]:
        """What a tokenizer learns from."""

    @abstractmethod
    def _encode(self, records: Records) -> dict[str, Encoded]:
        """The sequences of the rows, by what a person calls them."""

    @abstractmethod
    def _samples(self, name: str, records: Records, tokens: list[Ragged], options: dict[str, Any]) -> Texts:
        """What batches are made of, given the options of :class:`Texts`."""

    def _begin(self, augmentations: Sequence[Augmentation] | None, **least: int) -> None:
        """Check the hyperparameters; ``least`` as in :meth:`ResumableData._check_settings`."""
        self._check_settings(max_length=1, max_tokens=1, bpe_vocab_size=257, max_bad_records=0, **least)
        settings = self.hparams
        check_rate(settings["token_dropout"])
        if settings["too_long"] not in ("truncate", "refuse"):
            raise UsageError(f"too_long must be 'truncate' or 'refuse', got {settings['too_long']!r}")
        hub.check_settings(settings)
        self._augmentations, settings["augmentations"] = checked(augmentations)
        self.max_length: int = settings["max_length"]
        self.fractions = {"validation": settings["val_fraction"], "test": settings["test_fraction"]}
        self._read: dict[str, Records] = {}
        self._bad = BadRecords(settings["max_bad_records"])
        self._cut = Counter[str]()

    # ---- rows

    @property
    def samples(self) -> dict[str, Records]:
        """The rows of each split."""
        return {name: self._records(name) for name in ("train", *self.fractions)}

    def _records(self, name: str) -> Records:
        if name not in self._read and self._has_own(name):
            self._read[name] = self._own(name)
        if name not in self._read:
            held_out = {split: share for split, share in self.fractions.items() if not self._has_own(split)}
            if self.hparams["files"] is None and self.hparams["dataset"] is None:
                embedded = self._embedded()
                self._read |= {split: embedded[split] for split in ("train", *held_out)}
            else:
                rows = self._own("train")
                self._read |= {split: rows.take(ids) for split, ids in self._hold_out(rows, held_out).items()}
        return self._read[name]

    def _has_own(self, name: str) -> bool:
        """Whether a split that is not for training comes from files, or a split of the data set, of its own."""
        return name != "train" and (self.hparams[_FILES[name]] is not None or name in self._dataset)

    def _own(self, name: str) -> Records:
        used = [self.columns[0]] if name == "predict" else [*self.columns, *(["weight_column"] * (name == "train"))]
        set_ = [setting for setting in used if self.hparams[setting] is not None]
        columns = Columns(" and ".join(set_), *(self.hparams[setting] for setting in used))
        if (files := self.hparams[_FILES[name]]) is not None:
            return read_files(files, columns, self._bad)
        if name not in self._dataset:
            raise UsageError(f"expected dataset_splits to say what to train on, got {self.hparams['dataset_splits']}")
        return read_split(self._dataset[name], f"{self.hparams['dataset']} ({name})", columns, self._bad)

    @cached_property
    def _dataset(self) -> dict[str, Any]:
        name, splits = self.hparams["dataset"], self.hparams["dataset_splits"]
        return {} if name is None else hub.choose(hub.load(name, self.hparams["dataset_config"]), splits, name)

    # ---- tokens

    @cached_property
    def encoder(self) -> Encoder:
        """Texts to token ids."""
        return Encoder(self.hparams["tokenizer"], self.max_length, self.hparams["bpe_vocab_size"])

    def _tokens(self, encode: Encode, texts: Sequence[str], limit: str) -> Encoded:
        """Encode texts, by a setting that limits them, unless that has been done before."""
        how = json.dumps([self.encoder.state, limit, self.hparams[limit]])
        return limit, *encoded_once(encode, texts, how, self.hparams["cache_dir"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.encoder.vocab_size

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in a training batch of one device, on average and without padding; after setup."""
        self._require_setup()
        return max(1, round(self._mean_tokens * (self.batch_size if self.max_tokens is None else 1)))

    @cached_property
    def _mean_tokens(self) -> float:
        """In a sample; with ``max_tokens``, in a batch."""
        lengths = self._splits["train"].lengths().sum(1)
        return float(lengths.mean() if self.max_tokens is None else lengths.sum() / self.batches_per_epoch())

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what is for training and its validation; a second call changes nothing."""
        if self._is_evaluating():
            return
        for name in ("train", *self.fractions):
            self._split(name)
        self._stream_over(self._splits["train"])
        if (augmenter := self._splits["train"].augmenter) is not None:
            augmenter.prepare(stage)

    def predict_dataloader(self) -> EvaluationLoader:
        """Return the samples of ``predict_files``, or the test samples, of this rank."""
        return self._evaluation_loader(self._split("test" if self.hparams["predict_files"] is None else "predict"))

    def _split(self, name: str) -> Texts:
        if name not in self._splits:
            if not self.encoder.is_trained:
                self.encoder.train(self._texts(self._records("train")))
            if records := self._records(name):
                encoded = self._encode(records)
                records, tokens = within_limits(records, encoded, self.hparams, self._bad, self._cut)
            if not records:
                raise UsageError(f"expected {name} {self.rows}, got none: give more, or hold out another fraction")
            self._read[name] = records
            options: dict[str, Any] = {"seed": self._stream.seed}
            if name == "train":
                options |= {"token_dropout": self.hparams["token_dropout"], "weights": self._weights(records)}
                if options["weights"] is not None and not options["weights"].any():
                    raise UsageError(f"expected training {self.rows} that count, got weights that are all 0")
            if name == "predict":
                self._splits[name] = Texts(name, tokens[0], self.encoder.pad_id)
            else:
                self._splits[name] = self._samples(name, records, tokens, options)
            if name == "train" and self._augmentations:
                texts = records.sources
                self._splits[name].augmenter = Augmenter(self._augmentations, texts, self.encoder, self._stream.seed)
            if self._is_evaluating() and (losses := self._losses()):
                rank_zero_info(f"Data: {self.rows}: {name} {len(records):,}; {'; '.join(losses)}")
        samples: Texts = self._splits[name]
        return samples

    def _weights(self, records: Records) -> NDArray[np.float32] | None:
        """How much each row counts in training; None for all alike."""
        return None if records.weights is None else np.array(records.weights, dtype=np.float32)

    def describe(self) -> str:
        """Return what a person wants to know about the data; after setup."""
        self._require_setup()
        source = self.hparams["dataset"] or "files"
        if self.hparams["files"] is None and self.hparams["dataset"] is None:
            source = "functions of the standard library of Python"
        sizes = ", ".join(f"{name} {len(samples):,}" for name, samples in self._splits.items())
        return "\n".join([f"{source}, {self.rows}: {sizes}", *self._losses(), self._padding()])

    def _losses(self) -> list[str]:
        """What of the rows is not used, for people."""
        cut = ", ".join(f"{count:,} {what}" for what, count in self._cut.items() if count)
        return [*([f"cut off: {cut}"] if cut else []), *([self._bad.describe()] if self._bad.count else [])]

    # ---- state

    def load_vocabulary(self, state: Mapping[str, Any]) -> None:
        """Encode as in a checkpoint, given what it holds of this data module.

        Raises:
            UsageError: If the settings name another tokenizer, or texts have been encoded by another.
        """
        if state.get("tokenizer") is None and state.get("hugging_face_tokenizer") is None:
            return  # of before it was saved
        encoder = Encoder(self.hparams["tokenizer"], self.max_length, self.hparams["bpe_vocab_size"], state)
        if not self._splits:
            self.encoder = encoder
        elif not encoder.is_like(self.encoder):
            raise UsageError(
                f"the checkpoint has a tokenizer of {encoder.vocab_size:,} tokens, and the {self.rows} have been "
                f"encoded by another, of {self.vocab_size:,}: make a new {type(self).__name__} for it"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return position, excluded samples, what they refer to, and the vocabularies, as plain types."""
        return super().state_dict() | self.encoder.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Likewise, and :meth:`load_vocabulary` unless training is set up, which is compared."""
        if self._is_evaluating() or not self._splits:
            self.load_vocabulary(state_dict)
        super().load_state_dict(state_dict)

    @cached_property
    def _digest(self) -> str:
        samples: Texts = self._splits["train"]
        return samples.digest()

    def _meaning(self) -> dict[str, Any]:
        train: Texts = self._splits["train"]
        return {
            "seed": self._stream.seed,
            "token_dropout": self.hparams["token_dropout"],
            "augmentations": say(self.hparams["augmentations"]),
            "digest": self._digest,
            "tokenizer": self.encoder.state["tokenizer"],
            "weights": None if train.weights is None else hashlib.sha256(train.weights.tobytes()).hexdigest(),
        }
