"""Stable transformer training on PyTorch Lightning."""

from lit_transformer.data import (
    Augmentation,
    BackTranslation,
    ClassificationData,
    LanguageModelingData,
    MaskedLanguageModelingData,
    PreparedAugmentation,
    SentenceShuffle,
    SequencePairData,
)
from lit_transformer.distillation import Distillation
from lit_transformer.hugging_face import Lora
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
from lit_transformer.task import LitTask
from lit_transformer.tasks import LitCausalLM, LitClassifier, LitMaskedLM, LitPretrained, LitSeq2Seq

__all__ = [
    "Augmentation",
    "BackTranslation",
    "ClassificationData",
    "Distillation",
    "LanguageModelingData",
    "LitCausalLM",
    "LitClassifier",
    "LitMaskedLM",
    "LitPretrained",
    "LitRecipe",
    "LitSeq2Seq",
    "LitTask",
    "LitTransformer",
    "Lora",
    "MaskedLanguageModelingData",
    "MuonAdamW",
    "Noam",
    "Override",
    "ParamGroups",
    "PreparedAugmentation",
    "Schedule",
    "SentenceShuffle",
    "SequencePairData",
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
