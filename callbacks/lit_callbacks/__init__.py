"""Callbacks that watch and protect transformer training, in any PyTorch Lightning project."""

from lit_callbacks._recommended import recommended
from lit_callbacks.gradient_norm_logger import GradientNormLogger
from lit_callbacks.loss_curve import LossCurve
from lit_callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard

__all__ = ["GradientNormLogger", "LossCurve", "NonFiniteError", "NonFiniteGuard", "recommended"]
