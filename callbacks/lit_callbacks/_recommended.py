"""The callbacks that every run should have."""

from lightning.pytorch import Callback

from lit_callbacks.gradient_norm_logger import GradientNormLogger
from lit_callbacks.loss_curve import LossCurve
from lit_callbacks.non_finite_guard import NonFiniteGuard


def recommended() -> list[Callback]:
    """New instances of the callbacks that every run should have, with their defaults.

    Example:
        >>> [type(callback).__name__ for callback in recommended()]
        ['GradientNormLogger', 'NonFiniteGuard', 'LossCurve']
    """
    return [GradientNormLogger(), NonFiniteGuard(), LossCurve()]
