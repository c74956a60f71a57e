"""Stable transformer training on PyTorch Lightning."""

from lit_transformer.data import LanguageModelingData
from lit_transformer.module import LitTransformer
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import (
    MuonAdamW,
    Noam,
    Override,
    ParamGroups,
    Schedule,
    WarmupConstant,
    WarmupCosine,
    WarmupCosineRestarts,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupPlateau,
    WarmupPolynomial,
    WarmupStableDecay,
)
from lit_transformer.recipe import LitRecipe
from lit_transformer.tasks import LitCausalLM

__all__ = [
    "LanguageModelingData",
    "LitCausalLM",
    "LitRecipe",
    "LitTransformer",
    "MuonAdamW",
    "Noam",
    "Override",
    "ParamGroups",
    "Schedule",
    "Transformer",
    "TransformerConfig",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupCosineRestarts",
    "WarmupInverseSqrt",
    "WarmupLinear",
    "WarmupPlateau",
    "WarmupPolynomial",
    "WarmupStableDecay",
]
