"""A step of any optimizer, torch's or ZeRO's: who waits for it to be over, and how it comes to nothing."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lit_callbacks import _deepspeed
from lit_callbacks._facts import parameters


def after_step(optimizer: Optimizer, function: Callable[[], None]) -> Any:
    """Call a function right after each step, before a scheduler sets the next learning rate.

    Returns:
        What has ``remove()``; None for an optimizer that nobody can wait for.
    """
    if _deepspeed.is_zero(optimizer):
        return _deepspeed.AfterStep(optimizer, function)
    if hasattr(optimizer, "register_step_post_hook"):
        return optimizer.register_step_post_hook(lambda *_: function())
    return None


def prevent_step(optimizer: Optimizer) -> None:
    """Make the coming step change nothing."""
    if _deepspeed.is_zero(optimizer):
        _deepspeed.pass_over_step(optimizer)
        return
    # None, not zero: momentum and weight decay move weights with a zero gradient, and 0 * nan is nan.
    for parameter in parameters(optimizer):
        parameter.grad = None
