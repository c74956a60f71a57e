"""Where the norm stands around a sub-layer.

::

    pre                            post

    x ──┬─────────────────┐        x ──┬──────────┐
        └─ norm ─ f ─ drop ┴ + ─        └─ f ─ drop ┴ + ─ norm ─

Pre-LN (Xiong et al. 2020) leaves a clean path from the loss to every layer: it trains without warm-up and with larger
learning rates. Post-LN is the original (Vaswani et al. 2017): its gradients near the output are large at the start, so
it needs warm-up, and can be stuck at the unigram loss without any sign but that.
"""

from typing import ClassVar

from torch import Tensor, nn


class PreNorm(nn.Module):
    """``x + dropout(f(norm(x)))``; a stack of these needs a norm after the last."""

    needs_final_norm: ClassVar[bool] = True

    def __init__(self, sublayer: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm, self.sublayer, self.dropout = norm, sublayer, nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = x + self.dropout(self.sublayer(self.norm(x), *args))
        return out


class PostNorm(nn.Module):
    """``norm(x + dropout(f(x)))``."""

    needs_final_norm: ClassVar[bool] = False

    def __init__(self, sublayer: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm, self.sublayer, self.dropout = norm, sublayer, nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """Apply the sub-layer around the residual stream ``x``; ``args`` go to the sub-layer."""
        out: Tensor = self.norm(x + self.dropout(self.sublayer(x, *args)))
        return out


RESIDUALS: dict[str, type[PreNorm] | type[PostNorm]] = {"pre": PreNorm, "post": PostNorm}
