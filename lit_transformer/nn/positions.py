r"""How a token learns its place in the sequence.

========== ==================================================================== =========================
learned    a trained vector per position, added to the token embedding          Radford et al. 2019
sinusoidal fixed waves, added to the token embedding scaled by sqrt(d_model)    Vaswani et al. 2017, 3.4-5
rotary     queries and keys are turned by an angle proportional to the position Su et al. 2021
none       a causal mask alone tells how many tokens came before                Haviv et al. 2022
========== ==================================================================== =========================

Shapes: B batch, T length, D d_model, H heads, d features per head.
"""

import math

import torch
from torch import Tensor, nn

_WAVE_BASE = 10_000.0


def _angles(max_length: int, width: int, base: float) -> Tensor:
    """Position times ``base^(-2i/width)``, ``(max_length, width/2)``, in fp32 at least: bf16 skips places above 256."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.arange(max_length, dtype=dtype)[:, None] * base ** (-torch.arange(0, width, 2, dtype=dtype) / width)


class LearnedPositions(nn.Module):
    """Add a trained vector per position."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_length, d_model)

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        """``x`` plus the vectors of positions ``start`` to ``start + T``."""
        return x_BTD + self.embedding.weight[start : start + x_BTD.size(1)]


class SinusoidalPositions(nn.Module):
    """Scale the embedding by sqrt(d_model) and add fixed sines and cosines.

    Without the scale an embedding of standard deviation 0.02 would drown in waves of amplitude 1.
    """

    wave: Tensor

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.scale = math.sqrt(d_model)
        angle = _angles(max_length, d_model, _WAVE_BASE)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(torch.get_default_dtype())
        self.register_buffer("wave", wave, persistent=False)

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        """The scaled ``x`` plus the waves of positions ``start`` to ``start + T``."""
        return x_BTD * self.scale + self.wave[start : start + x_BTD.size(1)]


class RotaryPositions(nn.Module):
    """Turn each pair of features ``(i, i + d/2)`` of queries and keys by ``position * base^(-2i/d)``.

    A product of a query and a key then depends on the distance between them alone. One instance serves all layers.
    The tables are held in the default dtype and cast to that of the input: under autocast an upcast costs about a
    tenth of a step.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, max_length: int, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        angle, dtype = _angles(max_length, head_dim, base), torch.get_default_dtype()
        self.register_buffer("cos", angle.cos().repeat(1, 2).to(dtype), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), dim=-1).to(dtype), persistent=False)

    def forward(self, x_BHTd: Tensor, start: int = 0) -> Tensor:
        """``x`` turned as positions ``start`` to ``start + T``."""
        end = start + x_BHTd.size(-2)
        cos, sin = self.cos[start:end].to(x_BHTd.dtype), self.sin[start:end].to(x_BHTd.dtype)
        return x_BHTd * cos + x_BHTd.roll(x_BHTd.size(-1) // 2, dims=-1) * sin
