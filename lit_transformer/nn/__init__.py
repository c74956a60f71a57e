"""The transformer in pure torch: nothing here knows of Lightning."""

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.generation import generate, sample
from lit_transformer.nn.ids import check_ids
from lit_transformer.nn.masked import MaskedTransformer
from lit_transformer.nn.stack import Block
from lit_transformer.nn.summary import Summary, summarize
from lit_transformer.nn.transformer import Decoder, Encoder, EncoderDecoder, Transformer

__all__ = [
    "Block",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "MaskedTransformer",
    "Summary",
    "Transformer",
    "TransformerConfig",
    "check_ids",
    "generate",
    "sample",
    "summarize",
]
