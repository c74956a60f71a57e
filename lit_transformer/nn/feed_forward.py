"""The feed-forward sub-layer.

====== =========================================== =================
gelu   ``down(gelu(up(x)))``, the exact GELU        Hendrycks and Gimpel 2016
relu   ``down(relu(up(x)))``                        Vaswani et al. 2017
swiglu ``down(silu(gate(x)) * up(x))``              Shazeer 2020
====== =========================================== =================
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lit_transformer.nn.config import TransformerConfig


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them, ``(B, T, d_model)`` to the same shape."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ffn_width, bias=config.bias)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU()
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sub-layer."""
        out: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return out


class GatedFeedForward(nn.Module):
    """SwiGLU: one half of the projection gates the other. Gate and up are one matrix, gate first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.ffn_width, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sub-layer."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(self.dropout(F.silu(gate) * up))
        return out


def make_feed_forward(config: TransformerConfig) -> nn.Module:
    """The feed-forward sub-layer that ``config`` asks for.

    Example:
        >>> make_feed_forward(TransformerConfig(d_model=96, activation="swiglu")).down.in_features
        256
    """
    return GatedFeedForward(config) if config.activation == "swiglu" else FeedForward(config)
