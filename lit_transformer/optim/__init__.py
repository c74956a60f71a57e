"""Parameter groups and schedules."""

from lit_transformer.optim.param_groups import decay_groups
from lit_transformer.optim.schedules import Schedule, WarmupCosine

__all__ = ["Schedule", "WarmupCosine", "decay_groups"]
