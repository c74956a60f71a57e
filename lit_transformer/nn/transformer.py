"""The models: decoder-only, encoder, and encoder-decoder.

Shapes: B batch, T length, S length of the source, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lit_transformer.nn.attention import KeyValueCache
from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.init import initialize
from lit_transformer.nn.masks import bidirectional_mask, causal_mask, padding_mask
from lit_transformer.nn.positions import document_places
from lit_transformer.nn.residual import deepnorm_constants
from lit_transformer.nn.stack import Stack


class Decoder(Stack):
    """What each token says, given those before it; without an output layer.

    Args:
        config: Shape and choices.

    Shapes:
        Token ids ``(B, T)``, int64, to states ``(B, T, D)``; ``T <= config.max_length``. Where several documents share
        a sequence, ``documents`` ``(B, T)`` has a number for each, and none sees another.

    Raises:
        ValueError: If a sequence is longer than ``config.max_length``.
        IndexError: If an id is not in the vocabulary, on a CPU.
    """

    has_head: ClassVar[bool] = False

    def __init__(self, config: TransformerConfig) -> None:
        alpha, beta = deepnorm_constants(0, config.n_layers)[1]
        super().__init__(config, config.n_layers, alpha=alpha)
        self.head = make_head(config, self.token_embedding) if self.has_head else None
        initialize(self, config, n_sublayers=2 * config.n_layers, beta=beta)

    def states(
        self, ids_BT: Tensor, caches: Sequence[KeyValueCache] | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """States of the tokens; ``caches``, one a layer, hold what came before ``ids``."""
        start = caches[0].length if caches is not None else 0
        places = start if documents_BT is None else document_places(documents_BT)
        blocks = caches is None and self.takes_blocks
        mask = causal_mask(ids_BT.size(1), start, self.config.sliding_window, ids_BT.device, blocks, documents_BT)
        return self.run(self.embed(ids_BT, places), mask, places, caches)

    def forward(
        self, ids_BT: Tensor, caches: Sequence[KeyValueCache] | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Likewise."""
        return self.states(ids_BT, caches, documents_BT)


class Transformer(Decoder):
    """Token embedding, blocks, and the output layer over the vocabulary.

    Args:
        config: Its shape and choices.

    Shapes:
        Token ids ``(B, T)``, int64, to logits ``(B, T, V)``; ``T <= config.max_length``. Where several documents share
        a sequence, ``documents`` ``(B, T)`` has a number for each, and none sees another.

    Raises:
        ValueError: If a sequence is longer than ``config.max_length``.
        IndexError: If an id is not in the vocabulary, on a CPU.

    Example:
        >>> import torch
        >>> model = Transformer(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=2, n_heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 10])
    """

    has_head = True
    head: nn.Linear

    def forward(
        self, ids_BT: Tensor, caches: Sequence[KeyValueCache] | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each position; ``caches``, one a layer, hold what came before ``ids``."""
        logits_BTV: Tensor = self.head(self.states(ids_BT, caches, documents_BT))
        return logits_BTV


class Encoder(Stack):
    """What each token says, given all others; without an output layer.

    Args:
        config: Shape and choices.
        n_decoder: Layers of the decoder that it belongs to; DeepNorm's constants depend on them.

    Shapes:
        Token ids ``(B, S)``, int64, and a mask ``(B, S)`` that is true where a token is no padding, to states ``(B, S,
        D)``; what they are where there is padding means nothing. Documents as in :class:`Decoder`.

    Raises:
        ValueError: If a sequence is longer than ``config.max_length``.
        IndexError: If an id is not in the vocabulary, on a CPU.

    Example:
        >>> import torch
        >>> model = Encoder(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=2, n_heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 16])
    """

    def __init__(self, config: TransformerConfig, n_decoder: int = 0) -> None:
        alpha, beta = deepnorm_constants(config.n_layers, n_decoder)[0]
        super().__init__(config, config.n_layers, alpha=alpha)
        initialize(self, config, n_sublayers=2 * config.n_layers, beta=beta)

    def forward(self, ids_BS: Tensor, real_BS: Tensor | None = None, documents_BS: Tensor | None = None) -> Tensor:
        """States of the tokens."""
        length, window = ids_BS.size(1), self.config.sliding_window
        places = 0 if documents_BS is None else document_places(documents_BS)
        mask = bidirectional_mask(length, window, real_BS, ids_BS.device, self.takes_blocks, documents_BS)
        return self.run(self.embed(ids_BS, places), mask, places)


class EncoderDecoder(nn.Module):
    """An encoder, and a decoder that looks at what it says (Vaswani et al. 2017).

    With ``tie_embeddings`` source, target and output layer share one matrix, and with it a vocabulary.

    Args:
        config: Shape and choices.

    Shapes:
        Source ids ``(B, S)``, ids of the target so far ``(B, T)``, and a mask ``(B, S)`` that is true where the source
        is no padding, to logits ``(B, T, V)``.

    Raises:
        ValueError: If a sequence is longer than ``config.max_length``.
        IndexError: If an id is not in the vocabulary, on a CPU.

    Example:
        >>> import torch
        >>> model = EncoderDecoder(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=2, n_heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 10])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        n = config.decoder_layers
        alpha, beta = deepnorm_constants(config.n_layers, n)[1]
        self.config = config
        self.encoder = Encoder(config, n_decoder=n)
        self.decoder = Stack(config, n, cross=True, alpha=alpha)
        if config.tie_embeddings:  # the weight alone: functional_call does not restore a module that has two names
            self.decoder.token_embedding.weight = self.encoder.token_embedding.weight
        self.head = make_head(config, self.decoder.token_embedding)
        initialize(self.decoder, config, n_sublayers=3 * n, beta=beta)
        if not config.tie_embeddings:
            initialize(self.head, config, n_sublayers=3 * n, beta=beta)

    def encode(self, source_BS: Tensor, real_BS: Tensor | None = None) -> Tensor:
        """What the encoder says of the source, ``(B, S, D)``."""
        return self.encoder(source_BS, real_BS)  # type: ignore[no-any-return]

    def decode(
        self,
        target_BT: Tensor,
        memory_BSD: Tensor,
        real_BS: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits of the token after each of the target, given :meth:`encode`'s states."""
        start = caches[0].length if caches is not None else 0
        blocks = caches is None and self.decoder.takes_blocks
        mask = causal_mask(target_BT.size(1), start, self.config.sliding_window, target_BT.device, blocks)
        seen = None if real_BS is None else padding_mask(real_BS)
        logits_BTV: Tensor = self.head(
            self.decoder.run(self.decoder.embed(target_BT, start), mask, start, caches, memory_BSD, seen)
        )
        return logits_BTV

    def forward(self, source_BS: Tensor, target_BT: Tensor, real_BS: Tensor | None = None) -> Tensor:
        """Logits of the token after each of the target."""
        return self.decode(target_BT, self.encode(source_BS, real_BS), real_BS)

    def make_caches(self) -> list[KeyValueCache]:
        """Empty caches, one a layer of the decoder, for generation."""
        return self.decoder.make_caches()


def make_head(config: TransformerConfig, token_embedding: nn.Embedding, bias: bool = False) -> nn.Linear:
    """The output layer over the vocabulary."""
    head = nn.Linear(config.d_model, config.vocab_size, bias=bias)
    if config.tie_embeddings:
        head.weight = token_embedding.weight
    return head
