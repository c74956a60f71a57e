"""Stable transformer training on PyTorch Lightning."""

from lit_transformer.data import LanguageModelingData
from lit_transformer.module import LitTransformer
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import Schedule, WarmupCosine
from lit_transformer.tasks import LitCausalLM

__all__ = [
    "LanguageModelingData",
    "LitCausalLM",
    "LitTransformer",
    "Schedule",
    "Transformer",
    "TransformerConfig",
    "WarmupCosine",
]
