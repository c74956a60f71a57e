"""What a data module may offer. Structural: have the method, and the callbacks use it; no import is needed."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasSampleIds(Protocol):
    """Knows which samples a batch was made of, so that a bad step can be traced to its data.

    Example:
        >>> class Data:
        ...     def sample_ids(self, batch):
        ...         return batch["index"].tolist()
        >>> isinstance(Data(), HasSampleIds)
        True
    """

    def sample_ids(self, batch: Any) -> list[int]:
        """Identities of the samples in a batch on this rank, stable over epochs and restarts."""
        ...


@runtime_checkable
class HasPosition(Protocol):
    """Knows how far into the data training is."""

    def position(self) -> int:
        """Samples consumed so far, over all ranks."""
        ...


@runtime_checkable
class CanSkip(Protocol):
    """Can leave out the samples that would come next."""

    def skip(self, n: int) -> None:
        """Move ``n`` samples forward, over all ranks, without reading them."""
        ...


@runtime_checkable
class CanExclude(Protocol):
    """Can keep samples out of training for good."""

    def exclude(self, ids: Iterable[int]) -> None:
        """Never draw these samples again, also after a restart."""
        ...


@runtime_checkable
class HasOpenAnomaly(Protocol):
    """A callback that knows of bad steps, and whether it is over them."""

    def has_open_anomaly(self) -> bool:
        """Whether what is in memory may be damaged. The same on all ranks."""
        ...


@runtime_checkable
class CanExpectShift(Protocol):
    """A callback that judges losses, and can be told of another level by whoever changes the data on purpose."""

    def expect_shift(self) -> None:
        """The loss is about to change. To be called on all ranks."""
        ...


@runtime_checkable
class HasFingerprint(Protocol):
    """Knows what its samples and their order hang on, so that a run does not go on with others unnoticed.

    Example:
        >>> class Data:
        ...     def fingerprint(self):
        ...         return {"seed": 0, "block_size": 256}
        >>> isinstance(Data(), HasFingerprint)
        True
    """

    def fingerprint(self) -> Mapping[str, Any]:
        """Plain values, equal if and only if the same place in the data means the same sample; after setup."""
        ...


@runtime_checkable
class CanSaveNow(Protocol):
    """A checkpoint callback that can be asked for a checkpoint."""

    def save_now(self, trainer: Any, place: str = "between_steps") -> str | None:
        """Save the state as it is, on all ranks together; the path, or None where it is not fit to be saved.

        ``place`` is where training stands: ``between_steps``, ``epoch_start``, or ``validation``, in front of or inside
        a validation that is to be done when the run goes on.
        """
        ...
