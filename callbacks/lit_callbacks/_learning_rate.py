"""A learning rate that one optimizer step sees, and no schedule."""

from typing import Any

from torch.optim import Optimizer


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
    handles: list[Any] = []
    normal = [group["lr"] for group in optimizer.param_groups]

    def lower(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def put_back(*_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, normal, strict=True):
            group["lr"] = lr

    if has_scaler:
        handles.append(optimizer.register_step_pre_hook(lower))
    else:
        lower()
    handles.append(optimizer.register_step_post_hook(put_back))
    return handles
