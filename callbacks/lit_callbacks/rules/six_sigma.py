"""OLMo-core's rule."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from lit_callbacks.rules._rule import SpikeRule, Verdict, require


@dataclass
class SixSigma(SpikeRule):
    """Anomalous if the loss or the gradient norm is more than ``sigma`` standard deviations above its recent mean.

    The rule of OLMo-core's ``SkipStepOptimizer``: the same decisions on finite values, those rejected entering the
    window as they do there. So it gets used to a fault within a few steps, and while the window holds the first descent
    it fires on next to nothing; it is here to compare with.

    Args:
        window: Steps of which mean and standard deviation are taken.
        sigma: Standard deviations above the mean.

    Raises:
        ValueError: If ``window`` is below 2 or ``sigma`` not above 0.

    State: at most ``window`` losses and norms.

    Example:
        >>> rule = SixSigma(window=4)
        >>> for loss in (2.0, 2.1, 1.9, 2.0):
        ...     rule.keep(loss, 1.0, accepted=True)
        >>> rule.judge(2.4, 1.0).anomalous, rule.judge(2.5, 1.0).anomalous
        (False, True)
    """

    window: int = 128
    sigma: float = 6.0

    def __post_init__(self) -> None:
        require("SixSigma", "window", self.window, 2)
        require("SixSigma", "sigma", self.sigma, 0, above=True)
        self.restart()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look, and change nothing."""
        # The original appends first, and is active from half a window on, counting the step that is judged.
        if len(self._memory["losses"]) + 1 < max(2, self.window // 2):
            return Verdict(anomalous=False, score=0.0)
        above, deviation = _above(loss, self._memory["losses"])
        norm_above, norm_deviation = _above(grad_norm, self._memory["norms"])
        reason = "gradient norm" if norm_above > self.sigma * norm_deviation else ""
        reason = "loss" if above > self.sigma * deviation else reason
        return Verdict(bool(reason), above / max(deviation, 1e-12), reason, max(above, self.sigma * deviation))

    def keep(self, loss: float, grad_norm: float, accepted: bool) -> None:
        """Remember a step, whether it was made or not."""
        self._memory["losses"] = [*self._memory["losses"], loss][-self.window :]
        self._memory["norms"] = [*self._memory["norms"], grad_norm][-self.window :]

    def restart(self, values: Iterable[tuple[float, float]] = ()) -> None:
        """Forget everything but these."""
        self._memory = {"losses": [], "norms": []}
        for loss, grad_norm in values:
            self.keep(loss, grad_norm, accepted=True)


def _above(value: float, past: list[float]) -> tuple[float, float]:
    """How far a value is above the mean of the past, and the standard deviation of the past."""
    return value - statistics.fmean(past), statistics.stdev(past) if len(past) > 1 else 0.0
