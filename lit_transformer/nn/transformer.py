"""The decoder-only transformer.

Shapes: B batch, T length, D d_model, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from lit_transformer.nn.attention import KeyValueCache, SelfAttention
from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.feed_forward import make_feed_forward
from lit_transformer.nn.init import initialize
from lit_transformer.nn.norm import make_norm
from lit_transformer.nn.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from lit_transformer.nn.residual import RESIDUALS


class Block(nn.Module):
    """Attention, then feed-forward, each in its residual connection."""

    def __init__(self, config: TransformerConfig, rotary: RotaryPositions | None = None) -> None:
        super().__init__()
        residual = RESIDUALS[config.norm_placement]
        self.attention = residual(SelfAttention(config, rotary), make_norm(config), config.residual_dropout)
        self.feed_forward = residual(make_feed_forward(config), make_norm(config), config.residual_dropout)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Apply the block."""
        x_BTD = self.attention(x_BTD, cache)
        return self.feed_forward(x_BTD)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Token embedding, blocks, and the output layer over the vocabulary.

    Args:
        config: Its shape and choices.

    Shapes:
        Token ids ``(B, T)``, int64, to logits ``(B, T, V)``; ``T <= config.max_length``.

    Raises:
        ValueError: If a sequence is longer than ``config.max_length``.

    Example:
        >>> import torch
        >>> model = Transformer(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=2, n_heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 10])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions: nn.Module | None = None
        rotary = None
        if config.positions == "rotary":
            rotary = RotaryPositions(config.max_length, config.head_dim)
        elif config.positions == "learned":
            self.positions = LearnedPositions(config.max_length, config.d_model)
        else:
            self.positions = SinusoidalPositions(config.max_length, config.d_model)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config, rotary) for _ in range(config.n_layers))
        needs_final_norm = RESIDUALS[config.norm_placement].needs_final_norm
        self.final_norm = make_norm(config) if needs_final_norm else nn.Identity()
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        initialize(self, config)

    def forward(self, ids_BT: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Logits of the token after each position; ``caches``, one a layer, hold what came before ``ids``."""
        start = caches[0].length if caches is not None else 0
        if start + ids_BT.size(1) > self.config.max_length:
            raise ValueError(
                f"a sequence of {start + ids_BT.size(1)} tokens is longer than max_length={self.config.max_length}; "
                "shorten it, or build the model with a larger max_length"
            )
        x_BTD = self.token_embedding(ids_BT)
        if self.positions is not None:
            x_BTD = self.positions(x_BTD, start)
        x_BTD = self.embedding_dropout(x_BTD)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, caches[i] if caches is not None else None)
        logits_BTV: Tensor = self.head(self.final_norm(x_BTD))
        return logits_BTV

    def make_caches(self) -> list[KeyValueCache]:
        """Empty caches, one a layer, for generation."""
        return [KeyValueCache(self.config.max_length) for _ in self.blocks]
