"""ZClip's z-score, as a rule to skip by."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lit_callbacks._z_score import ZScoreThreshold
from lit_callbacks.rules._rule import SpikeRule, Verdict


@dataclass
class ZScore(SpikeRule):
    """Anomalous if the gradient norm is more than ``z_threshold`` standard deviations above its moving average.

    The statistics of ZClip (Kumar et al. 2025), which learn from what its clipping leaves of a norm. It was made to
    clip by (:class:`~lit_callbacks.AdaptiveGradientClipping`): of healthy steps it finds 2 to 7 % out of line, which is
    too many to skip. It is here to compare with.

    Args:
        alpha: Weight of the past in the averages.
        z_threshold: Standard deviations above the average.
        warmup_steps: Norms to collect before anything is judged.

    Raises:
        ValueError: If an argument is out of range.

    State: the averages, and the norms of the warm-up.

    Example:
        >>> rule = ZScore(warmup_steps=2)
        >>> rule.keep(2.0, 1.0, accepted=True), rule.keep(2.0, 3.0, accepted=True)
        (None, None)
        >>> rule.judge(2.0, 4.0).anomalous, rule.judge(2.0, 5.0).anomalous
        (False, True)
    """

    alpha: float = 0.97
    z_threshold: float = 2.5
    warmup_steps: int = 25

    def __post_init__(self) -> None:
        self.restart()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look, and change nothing."""
        z = self._norms.z_score(grad_norm)
        if z <= self.z_threshold:
            return Verdict(anomalous=False, score=z)
        return Verdict(True, z, "gradient norm", excess=math.inf)  # of the loss it knows nothing

    def keep(self, loss: float, grad_norm: float, accepted: bool) -> None:
        """Learn what clipping would leave of the norm, whether the step was made or not."""
        self._norms.update(grad_norm)

    def restart(self, values: Iterable[tuple[float, float]] = ()) -> None:
        """Forget everything but these."""
        self._norms = ZScoreThreshold(self.alpha, self.z_threshold, self.warmup_steps)
        for _, grad_norm in values:
            self._norms.update(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the norms of the warm-up."""
        return self._norms.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Judge as the rule that was saved."""
        self._norms.load_state_dict(state)
