"""The rule of the tutorials."""

from collections.abc import Iterable
from dataclasses import dataclass

from lit_callbacks.rules._rule import SpikeRule, Verdict, require


@dataclass
class BestLossRatio(SpikeRule):
    """Anomalous if the loss is above ``threshold`` times the best so far.

    Simple, and for language models nearly blind: a loss of 1.5 has to go to 15 before it speaks.

    Args:
        threshold: Times the best loss.

    Raises:
        ValueError: If ``threshold`` is not above 1.

    State: the best loss.

    Example:
        >>> rule = BestLossRatio(threshold=3.0)
        >>> rule.keep(2.0, 1.0, accepted=True)
        >>> rule.judge(5.9, 1.0).anomalous, rule.judge(6.1, 1.0).anomalous
        (False, True)
    """

    threshold: float = 10.0

    def __post_init__(self) -> None:
        require("BestLossRatio", "threshold", self.threshold, 1, above=True)
        self.restart()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look, and change nothing."""
        best = self._memory["best"]
        if best is None or best <= 0:
            return Verdict(anomalous=False, score=0.0)
        bad = loss > self.threshold * best
        return Verdict(bad, loss / best, "loss" if bad else "", loss - best)

    def keep(self, loss: float, grad_norm: float, accepted: bool) -> None:
        """Remember the loss, if it is the best of the steps that were made."""
        best = self._memory["best"]
        if accepted and (best is None or loss < best):
            self._memory["best"] = loss

    def restart(self, values: Iterable[tuple[float, float]] = ()) -> None:
        """Forget everything but these."""
        self._memory = {"best": min((loss for loss, _ in values), default=None)}
