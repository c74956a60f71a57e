"""What a rule is: one look at a step's loss and gradient norm."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """What a rule thinks of a step.

    Args:
        anomalous: Whether the step should not be made.
        score: How far out it is, in the rule's own units.
        reason: The part of the rule that spoke, empty if none did.
        excess: Nats by which a loss like this is above what is normal: damaged weights would cost as much on any batch.
        suspicious: Not enough to skip the step, but enough to look at the weights.
    """

    anomalous: bool
    score: float
    reason: str = ""
    excess: float = 0.0
    suspicious: bool = False


class SpikeRule(ABC):
    """Judges finite losses and gradient norms against those it has seen. Non-finite ones never come here.

    A subclass is a dataclass whose arguments are its settings and whose memory is in ``_memory``, as plain types.
    """

    _memory: dict[str, Any]

    def __repr__(self) -> str:
        # The settings alone, so that a resumed rule is known for the same; a dataclass has one like it.
        settings = [f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_")]
        return f"{type(self).__name__}({', '.join(settings)})"

    @abstractmethod
    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look, and change nothing."""

    @abstractmethod
    def keep(self, loss: float, grad_norm: float, accepted: bool) -> None:
        """Remember a step that was judged, and whether it was made."""

    @abstractmethod
    def restart(self, values: Iterable[tuple[float, float]] = ()) -> None:
        """Forget everything: the level has changed, and these losses and gradient norms are the new normal."""

    def rewind(self) -> None:  # noqa: B027  # most rules have nothing of the kind
        """The weights have gone back to an earlier step: forget what only made sense in one sequence."""

    def state_dict(self) -> dict[str, Any]:
        """The memory, as plain types."""
        return copy.deepcopy(self._memory)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Judge as the rule that was saved."""
        self._memory = self._memory | copy.deepcopy(state)  # an older one has less in it


def require(rule: str, name: str, value: float, low: float, above: bool = False) -> None:
    """Refuse a setting out of range.

    Raises:
        ValueError: If ``value`` is below ``low``, or not above it where ``above`` is set.
    """
    if value < low or (above and value == low):
        raise ValueError(f"{rule}: {name} must be {'above' if above else 'at least'} {low}, got {value}")
