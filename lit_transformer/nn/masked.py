"""An encoder that guesses hidden tokens."""

from torch import Tensor, nn

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.init import initialize
from lit_transformer.nn.norm import make_norm
from lit_transformer.nn.transformer import Encoder, make_head


class MaskedHead(nn.Module):
    """``output(norm(gelu(dense(x))))`` over the vocabulary (Devlin et al. 2019); the output layer has a bias, too."""

    def __init__(self, config: TransformerConfig, token_embedding: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = nn.GELU()
        self.norm = make_norm(config)
        self.output = make_head(config, token_embedding, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits ``(B, T, V)``."""
        logits_BTV: Tensor = self.output(self.norm(self.activation(self.dense(x_BTD))))
        return logits_BTV


class MaskedTransformer(nn.Module):
    """An encoder with an output layer for hidden tokens, as BERT.

    Args:
        config: Shape and choices.

    Shapes:
        Token ids ``(B, T)``, int64, and a mask ``(B, T)`` that is true where a token is no padding, to logits ``(B, T,
        V)``. Documents as in :class:`~lit_transformer.nn.transformer.Decoder`.

    Example:
        >>> import torch
        >>> model = MaskedTransformer(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=2, n_heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 10])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = MaskedHead(config, self.encoder.token_embedding)
        weight = self.head.output.weight.detach().clone()
        initialize(self.head, config, n_sublayers=2 * config.n_layers)
        if config.tie_embeddings:  # which the encoder has initialised
            self.head.output.weight.data.copy_(weight)

    def forward(self, ids_BT: Tensor, real_BT: Tensor | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """Logits of the token at each position."""
        logits_BTV: Tensor = self.head(self.encoder(ids_BT, real_BT, documents_BT))
        return logits_BTV
