"""Blocks, and a stack of them between embeddings and a last norm.

Shapes: B batch, T length, S length of the source, D d_model.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_transformer.nn.attention import CrossAttention, KeyValueCache, SelfAttention
from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.feed_forward import make_feed_forward
from lit_transformer.nn.flex import SMALLEST_HEAD
from lit_transformer.nn.ids import check_ids
from lit_transformer.nn.masks import Mask
from lit_transformer.nn.norm import make_norm
from lit_transformer.nn.positions import LearnedPositions, Places, RotaryPositions, SinusoidalPositions
from lit_transformer.nn.residual import RESIDUALS


class Block(nn.Module):
    """Attention, attention to another sequence if there is one, then feed-forward, each in its residual connection.

    Args:
        config: The model's configuration.
        rotary: Rotary positions, shared by all layers, or None.
        cross: Whether there is another sequence.
        stochastic_depth: Probability that a sample passes by each of the sub-layers.
        alpha: Weight of the stream under DeepNorm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rotary: RotaryPositions | None = None,
        cross: bool = False,
        stochastic_depth: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        residual, how = RESIDUALS[config.norm_placement], (config, stochastic_depth, alpha)
        self.attention = residual(SelfAttention(config, rotary), *how)
        self.cross_attention = residual(CrossAttention(config), *how) if cross else None
        self.feed_forward = residual(make_feed_forward(config), *how)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask = "causal",
        places: Places = 0,
        cache: KeyValueCache | None = None,
        memory_BSD: Tensor | None = None,
        memory_mask: Mask = None,
    ) -> Tensor:
        """Apply the block."""
        x_BTD = self.attention(x_BTD, mask, places, cache)
        if self.cross_attention is not None:
            x_BTD = self.cross_attention(x_BTD, memory_BSD, memory_mask, cache)
        return self.feed_forward(x_BTD)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Embeddings, blocks, and a norm at the end where the placement of norms needs one.

    Args:
        config: Shape and choices.
        n_layers: Number of blocks.
        cross: Whether the blocks attend to another sequence.
        alpha: Weight of the stream under DeepNorm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        n_layers: int,
        cross: bool = False,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions: nn.Module | None = None
        rotary = None
        if config.positions == "rotary":
            rotary = RotaryPositions(config.max_length, config.head_dim, config.rope_base)
        elif config.positions == "learned":
            self.positions = LearnedPositions(config.max_length, config.d_model)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalPositions(config.max_length, config.d_model)
        # The scale of "Spike No More"; sinusoidal positions scale by themselves.
        scaled = config.init == "small" and config.positions != "sinusoidal"
        self.embedding_scale = math.sqrt(config.d_model) if scaled else 1.0
        self.embedding_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        depths = [config.stochastic_depth * (i + 1) / n_layers for i in range(n_layers)]
        self.blocks = nn.ModuleList(Block(config, rotary, cross, depth, alpha) for depth in depths)
        needs_final_norm = RESIDUALS[config.norm_placement].needs_final_norm
        self.final_norm = make_norm(config) if needs_final_norm else nn.Identity()

    def embed(self, ids_BT: Tensor, places: Places = 0) -> Tensor:
        """Embeddings ``(B, T, D)`` of tokens at some places."""
        length = ids_BT.size(1) + (places if isinstance(places, int) else 0)
        if length > self.config.max_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_length={self.config.max_length}; "
                "shorten it, or build the model with a larger max_length"
            )
        try:
            x_BTD = self.token_embedding(ids_BT)
        except IndexError:  # on a CPU torch looks at every id anyway, but does not say which is wrong
            check_ids(ids_BT, self.config.vocab_size)
            raise
        if self.embedding_scale != 1.0:
            x_BTD = x_BTD * self.embedding_scale
        if self.positions is not None:
            x_BTD = self.positions(x_BTD, places)
        dropped: Tensor = self.embedding_dropout(self.embedding_norm(x_BTD))
        return dropped

    def run(
        self,
        x_BTD: Tensor,
        mask: Mask,
        places: Places = 0,
        caches: Sequence[KeyValueCache] | None = None,
        memory_BSD: Tensor | None = None,
        memory_mask: Mask = None,
    ) -> Tensor:
        """All blocks and the norm at the end, ``(B, T, D)`` to the same."""
        every = self.config.activation_checkpointing if self.training else 0
        for i, block in enumerate(self.blocks):
            given = (x_BTD, mask, places, caches[i] if caches is not None else None, memory_BSD, memory_mask)
            again = every and i % every == 0
            x_BTD = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
        return self.final_norm(x_BTD)  # type: ignore[no-any-return]

    @property
    def takes_blocks(self) -> bool:
        """Whether windows can be left to flex attention."""
        fits = self.token_embedding.weight.is_cuda and self.config.head_dim >= SMALLEST_HEAD
        return fits and not (self.training and self.config.attention_dropout)

    def make_caches(self) -> list[KeyValueCache]:
        """Empty caches, one a layer, for generation."""
        return [KeyValueCache(self.config.max_length) for _ in self.blocks]
