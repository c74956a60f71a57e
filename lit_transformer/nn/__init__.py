"""The transformer in pure torch: nothing here knows of Lightning."""

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.generation import generate, sample
from lit_transformer.nn.transformer import Block, Transformer

__all__ = ["Block", "Transformer", "TransformerConfig", "generate", "sample"]
