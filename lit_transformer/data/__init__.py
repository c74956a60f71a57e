"""Data modules, and the text, tokenizers, order and loaders under them."""

from lit_transformer.data.augmentation.augmenter import Augmentation, PreparedAugmentation
from lit_transformer.data.augmentation.back_translation import BackTranslation
from lit_transformer.data.augmentation.sentence_shuffle import SentenceShuffle
from lit_transformer.data.classification import ClassificationData
from lit_transformer.data.language_modeling import LanguageModelingData
from lit_transformer.data.masked import MaskedLanguageModelingData
from lit_transformer.data.sequence_pairs import SequencePairData

__all__ = [
    "Augmentation",
    "BackTranslation",
    "ClassificationData",
    "LanguageModelingData",
    "MaskedLanguageModelingData",
    "PreparedAugmentation",
    "SentenceShuffle",
    "SequencePairData",
]
