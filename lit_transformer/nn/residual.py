"""Where the norm stands around a sub-layer.

::

    pre                            post

    x ──┬─────────────────┐        x ──┬──────────┐
        └─ norm ─ f ─ drop ┴ + ─        └─ f ─ drop ┴ + ─ norm ─

    sandwich                       deepnorm

    x ──┬─────────────────────────┐        x ──┬─ * alpha ─┐
        └─ norm ─ f ─ norm ─ drop ┴ + ─        └─ f ─ drop ┴ + ─ norm ─

    rezero

    x ──┬──────────────────┐
        └─ f ─ drop * gate ┴ + ─

Pre-LN (Xiong et al. 2020) leaves a clean path from the loss to every layer: it trains without warm-up and with larger
learning rates. Post-LN is the original (Vaswani et al. 2017): its gradients near the output are large at the start, so
it needs warm-up, and can be stuck at the unigram loss without any sign but that. Sandwich, or peri-LN (Ding et al.
2021, Kim et al. 2025), is pre-LN whose every addition to the stream has a norm of its own, so that the stream cannot
grow without bound. DeepNorm (Wang et al. 2022) is post-LN whose stream weighs more than what is added, by the depth,
and is initialised to match: it trains at a thousand layers. ReZero (Bachlechner et al. 2020) has no norm, and a gate
for each sub-layer that begins at 0, so that a model of any depth begins as the identity.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.norm import make_norm


class StochasticDepth(nn.Module):
    """Leave out a branch for some samples of a batch, and enlarge it for the others (Huang et al. 2016).

    Args:
        p: Probability that a sample goes without.

    Shapes:
        ``(B, T, D)`` to the same, the same in expectation.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply it, in training."""
        if not self.training:
            return x_BTD
        kept_B11 = torch.rand(x_BTD.size(0), 1, 1, device=x_BTD.device) >= self.p
        return x_BTD * (kept_B11 / (1 - self.p)).to(x_BTD.dtype)


class Residual(nn.Module):
    """A sub-layer, dropout, and what is around them.

    Args:
        sublayer: From ``(B, T, D)``, and whatever else it takes, to ``(B, T, D)``.
        config: The model's configuration.
        stochastic_depth: Probability that a sample passes by.
        alpha: Weight of the stream, see :class:`DeepNorm`.
    """

    needs_final_norm: ClassVar[bool] = False
    """Whether a stack of these needs a norm after the last."""
    norms: ClassVar[tuple[str, ...]] = ("norm",)
    norm: nn.Module
    output_norm: nn.Module

    def __init__(
        self, sublayer: nn.Module, config: TransformerConfig, stochastic_depth: float = 0.0, alpha: float = 1.0
    ) -> None:
        super().__init__()
        for name in self.norms:
            self.add_module(name, make_norm(config))
        self.sublayer, self.alpha = sublayer, alpha
        self.dropout: nn.Module = nn.Dropout(config.residual_dropout)
        if stochastic_depth:
            self.dropout = nn.Sequential(self.dropout, StochasticDepth(stochastic_depth))


class PreNorm(Residual):
    """``x + dropout(f(norm(x)))``."""

    needs_final_norm = True

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = x + self.dropout(self.sublayer(self.norm(x), *args))
        return out


class PostNorm(Residual):
    """``norm(x + dropout(f(x)))``."""

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = self.norm(x + self.dropout(self.sublayer(x, *args)))
        return out


class Sandwich(Residual):
    """``x + dropout(output_norm(f(norm(x))))``."""

    needs_final_norm = True
    norms = ("norm", "output_norm")

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = x + self.dropout(self.output_norm(self.sublayer(self.norm(x), *args)))
        return out


class DeepNorm(Residual):
    """``norm(alpha * x + dropout(f(x)))``."""

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = self.norm(self.alpha * x + self.dropout(self.sublayer(x, *args)))
        return out


class ReZero(Residual):
    """``x + gate * dropout(f(x))``, with a gate that is learned and begins at 0."""

    norms = ()

    def __init__(self, sublayer: nn.Module, config: TransformerConfig, *rest: float) -> None:
        super().__init__(sublayer, config, *rest)
        self.gate = nn.Parameter(torch.zeros(1))  # FSDP takes no scalars

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = x + self.gate * self.dropout(self.sublayer(x, *args))
        return out


RESIDUALS: dict[str, type[Residual]] = {
    "pre": PreNorm,
    "post": PostNorm,
    "sandwich": Sandwich,
    "deepnorm": DeepNorm,
    "rezero": ReZero,
}


def deepnorm_constants(n_encoder: int, n_decoder: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Alpha, the weight of the stream, and beta, the gain of the initialisation (Wang et al. 2022, table 1).

    Args:
        n_encoder: Layers of the encoder; 0 without one.
        n_decoder: Layers of the decoder; 0 without one.

    Returns:
        ``(alpha, beta)`` of the encoder, and of the decoder.

    Example:
        >>> deepnorm_constants(0, 8)[1]
        (2.0, 0.3535533905932738)
    """
    n, m = n_encoder, n_decoder
    if n and m:
        both = n**4 * m
        return (0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)), ((3 * m) ** 0.25, (12 * m) ** -0.25)
    depth = n or m
    alone = (2 * depth) ** 0.25, (8 * depth) ** -0.25
    return alone, alone
