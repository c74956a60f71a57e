"""Rules that judge a step by its loss and its gradient norm, for :class:`lit_callbacks.LossSpikeRecovery`."""

from lit_callbacks.rules._rule import SpikeRule, Verdict
from lit_callbacks.rules.best_loss_ratio import BestLossRatio
from lit_callbacks.rules.robust import RobustRule
from lit_callbacks.rules.six_sigma import SixSigma
from lit_callbacks.rules.z_score import ZScore

__all__ = ["BestLossRatio", "RobustRule", "SixSigma", "SpikeRule", "Verdict", "ZScore"]
