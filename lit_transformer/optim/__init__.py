"""Parameter groups, schedules, and an optimizer that torch has in two parts."""

from lit_transformer.optim.layers import layer_depths
from lit_transformer.optim.muon import MuonAdamW
from lit_transformer.optim.param_groups import Override, ParamGroups
from lit_transformer.optim.plateau import Plateau, WarmupPlateau
from lit_transformer.optim.schedule import Schedule, WarmupConstant
from lit_transformer.optim.schedules import (
    Noam,
    WarmupCosine,
    WarmupCosineRestarts,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupPolynomial,
    WarmupStableDecay,
)

__all__ = [
    "MuonAdamW",
    "Noam",
    "Override",
    "ParamGroups",
    "Plateau",
    "Schedule",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupCosineRestarts",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WarmupPlateau",
    "WarmupPolynomial",
    "WarmupStableDecay",
    "layer_depths",
]
