"""The learning rates of a run before it is made, for any optimizer and scheduler."""

import copy
import warnings
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def learning_rates(
    optimizer: Optimizer, scheduler: LRScheduler | None, steps: Sequence[int], start: int = 0
) -> list[list[float]]:
    """The learning rate of each group at each of some updates, counted from 0.

    A ``LambdaLR`` is asked, any other scheduler is stepped and put back.

    Args:
        optimizer: As it is before update ``start``.
        scheduler: What steps with it; None if nothing does.
        steps: Updates, in ascending order.
        start: The update that is next.

    Returns:
        A list per group, of one value per update.

    Cost: for schedulers other than ``LambdaLR``, some 10 µs for each update up to the last.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> learning_rates(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5), [0, 1, 2, 4])
        [[1.0, 1.0, 0.5, 0.25]]
    """
    if scheduler is None:
        return [[float(group["lr"])] * len(steps) for group in optimizer.param_groups]
    if isinstance(scheduler, LambdaLR):
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [[float(base) * multiplier(step) for step in steps] for base, multiplier in pairs]
    groups = [dict(group) for group in optimizer.param_groups]
    state = copy.deepcopy(scheduler.state_dict())
    found: list[list[float]] = [[] for _ in groups]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        at = start
        for step in steps:
            for _ in range(step - at):
                scheduler.step()
            at = step
            for values, group in zip(found, optimizer.param_groups, strict=True):
                values.append(float(group["lr"]))
    scheduler.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
    return found
