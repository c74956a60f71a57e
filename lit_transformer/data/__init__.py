"""Data modules, and the text, tokenizers, order and loaders under them."""

from lit_transformer.data.classification import ClassificationData
from lit_transformer.data.language_modeling import LanguageModelingData

__all__ = ["ClassificationData", "LanguageModelingData"]
