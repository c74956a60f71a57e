"""A learning rate that one optimizer step sees, and no schedule."""

from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from lit_callbacks._step import after_step

_NORMAL: "WeakKeyDictionary[Optimizer, list[float]]" = WeakKeyDictionary()
"""The learning rates of steps under way, which several callbacks may lower: all put back the same."""


def lower_learning_rate(optimizer: Optimizer, factor: float, has_scaler: bool) -> list[Any]:
    """Multiply the learning rates in the coming step, and put them back right after it.

    Schedules that multiply what they find, such as StepLR, must never see the lower ones. To be called in
    ``on_before_optimizer_step``, which is inside the optimizer's ``step`` unless there is a GradScaler; with one the
    step may not come at all.

    Returns:
        Hooks to be removed when the step is over.
    """
    if factor == 1:
        return []
    handles: list[Any] = [_Forget(optimizer)]
    normal = _NORMAL.setdefault(optimizer, [group["lr"] for group in optimizer.param_groups])

    def lower(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def put_back() -> None:
        for group, lr in zip(optimizer.param_groups, normal, strict=True):
            group["lr"] = lr
        _NORMAL.pop(optimizer, None)

    if has_scaler:
        handles.append(optimizer.register_step_pre_hook(lower))
    else:
        lower()
    handles.append(after_step(optimizer, put_back))
    return handles


class _Forget:
    """Removed with the hooks, also of a step that never came."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def remove(self) -> None:
        _NORMAL.pop(self.optimizer, None)
