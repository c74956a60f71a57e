r"""How a token learns its place in the sequence.

========== ==================================================================== =========================
learned    a trained vector per position, added to the token embedding          Radford et al. 2019
sinusoidal fixed waves, added to the token embedding scaled by sqrt(d_model)    Vaswani et al. 2017, 3.4-5
rotary     queries and keys are turned by an angle proportional to the position Su et al. 2021
none       a causal mask alone tells how many tokens came before                Haviv et al. 2022
========== ==================================================================== =========================

Where a token is, is said by the place of the first, whom the others follow, or by that of each, ``(B, T)``.

Shapes: B batch, T length, D d_model, H heads, d features per head.
"""

import math

import torch
from torch import Tensor, nn

_WAVE_BASE = 10_000.0

Places = int | Tensor


def document_places(documents_BT: Tensor) -> Tensor:
    """Where each token is in its document, ``(B, T)``; a document begins where the number changes.

    Example:
        >>> document_places(torch.tensor([[0, 0, 0, 1, 1, 2]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    place_T = torch.arange(documents_BT.size(1), device=documents_BT.device)
    begins = nn.functional.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
    return place_T - (place_T * begins).cummax(dim=1).values


def _at(table: Tensor, places: Places, length: int) -> Tensor:
    """Rows of a table, ``(T, ...)`` or ``(B, T, ...)``."""
    return table[places] if isinstance(places, Tensor) else table[places : places + length]


def _angles(max_length: int, width: int, base: float) -> Tensor:
    """Position times ``base^(-2i/width)``, ``(max_length, width/2)``, in fp32 at least: bf16 skips places above 256."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.arange(max_length, dtype=dtype)[:, None] * base ** (-torch.arange(0, width, 2, dtype=dtype) / width)


class LearnedPositions(nn.Module):
    """Add a trained vector per position."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_length, d_model)

    def forward(self, x_BTD: Tensor, places: Places = 0) -> Tensor:
        """``x`` plus the vectors of its places."""
        return x_BTD + _at(self.embedding.weight, places, x_BTD.size(1))


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

    def forward(self, x_BTD: Tensor, places: Places = 0) -> Tensor:
        """The scaled ``x`` plus the waves of its places."""
        return x_BTD * self.scale + _at(self.wave, places, x_BTD.size(1)).to(x_BTD.dtype)


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

    def forward(self, x_BHTd: Tensor, places: Places = 0) -> Tensor:
        """``x`` turned by its places."""
        cos, sin = (_at(table, places, x_BHTd.size(-2)).to(x_BHTd.dtype) for table in (self.cos, self.sin))
        if isinstance(places, Tensor):  # all heads alike
            cos, sin = cos[:, None], sin[:, None]
        return x_BHTd * cos + x_BHTd.roll(x_BHTd.size(-1) // 2, dims=-1) * sin
