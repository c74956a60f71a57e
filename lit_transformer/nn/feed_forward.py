"""The feed-forward sub-layer.

========= =========================================== ==========================
gelu      ``down(gelu(up(x)))``, the exact GELU        Hendrycks and Gimpel 2016
gelu_tanh likewise, approximated as GPT-2 does         Hendrycks and Gimpel 2016
relu      ``down(relu(up(x)))``                        Vaswani et al. 2017
silu      ``down(silu(up(x)))``                        Ramachandran et al. 2017
geglu     ``down(gelu(gate(x)) * up(x))``              Shazeer 2020
swiglu    ``down(silu(gate(x)) * up(x))``              Shazeer 2020
========= =========================================== ==========================
"""

from collections.abc import Callable

from torch import Tensor, nn

from lit_transformer.nn.config import TransformerConfig

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "geglu": nn.GELU,
    "swiglu": nn.SiLU,
}


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them, ``(B, T, d_model)`` to the same shape."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ffn_width, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sub-layer."""
        out: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return out


class GatedFeedForward(nn.Module):
    """One half of the projection gates the other. Gate and up are one matrix, gate first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.ffn_width, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sub-layer."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(self.dropout(self.activation(gate) * up))
        return out


def make_feed_forward(config: TransformerConfig) -> nn.Module:
    """The feed-forward sub-layer that ``config`` asks for.

    Example:
        >>> make_feed_forward(TransformerConfig(d_model=96, activation="swiglu")).down.in_features
        256
    """
    return GatedFeedForward(config) if config.gated else FeedForward(config)
