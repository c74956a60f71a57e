"""What every data module here shares: a place in the training data that is saved, restored and moved."""

from abc import abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any
from weakref import WeakSet

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from lit_transformer.data.batching.grouped import GroupedStream, padding
from lit_transformer.data.batching.loader import Batch, EvaluationLoader, Samples, TrainingLoader
from lit_transformer.data.batching.order import SampleStream
from lit_transformer.errors import UsageError


class ResumableData(LightningDataModule):
    """A data module whose training samples come from one endless stream.

    A subclass puts its ``train``, ``validation`` and ``test`` samples into ``_splits`` and ends every ``setup`` with
    :meth:`_stream_over`. Its hyperparameters include ``val_fraction``, ``test_fraction``, and the loader options
    ``num_workers``, ``prefetch_factor``, ``persistent_workers`` and ``pin_memory``.

    Args:
        batch_size: Samples in a batch of one device.
        seed: Seed of the sample order.
        group_by_length: Samples of like length together.
        max_tokens: Likewise, and as many as fit into so many tokens in a batch of one device, padding counted; then
            ``batch_size`` is that of evaluation alone.

    State: the position in the stream, the excluded samples, and what these refer to. The loader that Lightning sees
    saves the same position from the same place.
    """

    def __init__(
        self, batch_size: int, seed: int, group_by_length: bool = False, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size, self.max_tokens = batch_size, max_tokens
        by_length = group_by_length or max_tokens is not None
        self._stream = GroupedStream(seed, max_tokens is not None) if by_length else SampleStream(seed)
        self._splits: dict[str, Any] = {}  # of Samples; a subclass says which
        self._loaded: dict[str, Any] | None = None
        self._loaders: WeakSet[TrainingLoader | EvaluationLoader] = WeakSet()

    def _check_settings(self, **least: int) -> None:
        """Refuse hyperparameters that are out of range; ``least`` has the smallest value of the subclass's own."""
        least |= {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "seed": 0}
        for name, smallest in least.items():
            if (value := self.hparams[name]) is not None and value < smallest:
                raise UsageError(f"{name} must be at least {smallest}, got {value}")
        val_fraction, test_fraction = self.hparams["val_fraction"], self.hparams["test_fraction"]
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise UsageError(
                "val_fraction and test_fraction must be above 0 and leave something to train on, "
                f"got {val_fraction} and {test_fraction}"
            )
        for_workers = self.hparams["prefetch_factor"] is not None or self.hparams["persistent_workers"]
        if self.hparams["num_workers"] == 0 and for_workers:
            raise UsageError(
                "prefetch_factor and persistent_workers are about worker processes, got num_workers=0. "
                "Set num_workers, or leave them out."
            )

    @abstractmethod
    def _meaning(self) -> dict[str, Any]:
        """Return what a position and sample ids refer to, as plain types; after setup."""

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Return the length of the training loader for a number of devices that see different data; after setup."""
        self._require_setup()
        return self._stream.batches_per_epoch(self._training_size() * world_size)

    def sample_ids(self, batch: Batch) -> list[int]:
        """Return which training samples a batch is made of."""
        ids: list[int] = batch["sample_ids"].tolist()
        return ids

    def position(self) -> int:
        """Return how many samples of the stream all ranks together have passed over."""
        return self._stream.position

    def skip(self, n: int) -> None:
        """Pass over the next ``n`` samples of the stream, from the next batch on. To be called on every rank alike."""
        self._stream.skip(n)

    def exclude(self, ids: Iterable[int]) -> None:
        """Never draw these samples again, from the next batch on. To be called on every rank alike; after setup."""
        self._require_setup()
        self._stream.exclude(ids)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a position and sample ids refer to; after setup."""
        self._require_setup()
        return self._meant()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, the excluded samples, and what they refer to, as plain types."""
        self._require_setup()
        return self._stream.state_dict() | self._meant()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved stream, before or after setup.

        Raises:
            UsageError: If the state is of other data, or of data read in another way; before setup, at setup.
        """
        if self._is_evaluating():
            return  # a checkpoint may be evaluated on other data, and there is no stream to continue
        if self._stream.n:
            self._check_meaning(state_dict)
        self._loaded = state_dict
        self._stream.load_state_dict(state_dict)

    def train_dataloader(self) -> TrainingLoader | EvaluationLoader:
        """Return the loader that continues the stream."""
        return self._training_loader(self._split("train"))

    def val_dataloader(self) -> EvaluationLoader:
        """Return the validation samples of this rank."""
        return self._evaluation_loader(self._split("validation"))

    def test_dataloader(self) -> EvaluationLoader:
        """Return the test samples of this rank."""
        return self._evaluation_loader(self._split("test"))

    def predict_dataloader(self) -> EvaluationLoader:
        """Return the test samples of this rank."""
        return self.test_dataloader()

    def teardown(self, stage: str | None = None) -> None:
        """Stop persistent workers."""
        for loader in self._loaders:
            loader.close()

    def _split(self, name: str) -> Samples:
        """The samples of a split."""
        self._require_setup()
        samples: Samples = self._splits[name]
        return samples

    def _require_setup(self) -> None:
        if not self._stream.n:
            raise UsageError("the data has not been read yet: call setup() first, or pass the data module to a Trainer")

    def _stream_over(self, samples: Samples) -> None:
        """Say what the training samples are."""
        lengths = samples.lengths()
        if self.max_tokens is not None and (longest := int(lengths.sum(1).max())) > self.max_tokens:
            raise UsageError(
                f"expected max_tokens to be at least the longest sample's {longest} tokens, got {self.max_tokens}. "
                "Raise it, or lower max_length."
            )
        self._stream.over(lengths)
        if self._loaded is not None:
            self._check_meaning(self._loaded)

    def _check_meaning(self, state: dict[str, Any]) -> None:
        state = {"batching": "random", "packing": False} | state  # of before there were other ways
        for name, present in self._meant().items():
            if (saved := state.get(name, present)) != present:  # what is absent was not there yet
                raise UsageError(
                    f"the checkpoint's place in the data is for {name}={saved!s:.64}, this data module has "
                    f"{name}={present!s:.64}: the same place would be other samples. Resume with the data settings of "
                    "the checkpoint, or start a new run from its weights alone."
                )

    def _meant(self) -> dict[str, Any]:
        size = self._training_size() * self._rank_and_world_size()[1]
        return self._meaning() | {"batching": self._stream.describe(size)}

    def _training_size(self) -> int:
        """Samples, or tokens, in a training batch of one device."""
        return self.batch_size if self.max_tokens is None else self.max_tokens

    def _padding(self) -> str:
        """How much of the next training batches is padding, for people."""
        batches = (ids for ids, _ in self._stream.batches(self._training_size()))
        share = padding(self._splits["train"].lengths(), islice(batches, min(200, self.batches_per_epoch())))
        return f"{share:.0%} of the tokens in training batches are padding"

    def _is_evaluating(self) -> bool:
        if self.trainer is None:
            return False
        state = self.trainer.state
        return state.status == TrainerStatus.RUNNING and state.fn != TrainerFn.FITTING

    def _training_loader(self, samples: Samples) -> TrainingLoader | EvaluationLoader:
        """Return the loader that continues the stream; with ``overfit_batches`` one that repeats its first batches."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self._evaluation_loader(samples)
        loader = TrainingLoader(
            samples, self._stream, self._training_size(), *self._rank_and_world_size(), **self._loader_options()
        )
        self._loaders.add(loader)
        return loader

    def _evaluation_loader(self, samples: Samples) -> EvaluationLoader:
        loader = EvaluationLoader(samples, self.batch_size, *self._rank_and_world_size(), **self._loader_options())
        self._loaders.add(loader)
        return loader

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Return which part of the data is this process's; tensor-parallel processes share one."""
        sampler = self.trainer and self.trainer.distributed_sampler_kwargs
        return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)

    def _loader_options(self) -> dict[str, Any]:
        pin = self.hparams["pin_memory"]
        if pin is None:
            pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        names = ("num_workers", "prefetch_factor", "persistent_workers")
        return {name: self.hparams[name] for name in names} | {"pin_memory": pin}
