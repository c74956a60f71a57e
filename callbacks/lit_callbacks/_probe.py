"""Does an optimizer leave everything alone in a step without gradients? Tried on toy parameters, not assumed."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def step_without_gradients_fault(optimizer: Optimizer) -> str | None:
    """Take one step with gradients and one without, on a toy with the optimizer's class and settings.

    Returns:
        None if the second step changed neither parameters, state nor learning rates; otherwise what went wrong, as a
        clause. What else is counted in the groups can be put back: see :func:`group_settings`.

    Example:
        >>> step_without_gradients_fault(torch.optim.AdamW([torch.ones(3)], lr=0.1)) is None
        True
    """
    try:
        toy, parameters = _toy(optimizer)
        for parameter in parameters:
            gradient = torch.full_like(parameter, 0.5)
            parameter.grad = gradient.to_sparse() if isinstance(toy, torch.optim.SparseAdam) else gradient
        # On the class: schedulers patch `step` on the instance. With a closure: Lightning always passes one.
        type(toy).step(toy, closure=lambda: 0.0)
        before = copy.deepcopy([parameters, list(toy.state.values()), _rates(toy)])
        for parameter in parameters:
            parameter.grad = None
        type(toy).step(toy, closure=lambda: 0.0)
    except Exception as error:
        return f"it could not be tried on a toy parameter ({type(error).__name__}: {error})"
    after = [parameters, list(toy.state.values()), _rates(toy)]
    return None if _same(before, after) else "it moves parameters or its state when gradients are missing"


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What is in the groups besides parameters and learning rates, which schedules and other callbacks set."""
    return [
        {key: copy.copy(value) for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def _rates(optimizer: Optimizer) -> list[Any]:
    return [group.get("lr") for group in optimizer.param_groups]


def _toy(optimizer: Optimizer) -> tuple[Optimizer, list[Tensor]]:
    cls = type(optimizer)
    parameters, groups = [], []
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        like = next((parameter for parameter in group["params"] if parameter.requires_grad), group["params"][0])
        parameter = torch.ones([2] * like.ndim, dtype=like.dtype, device=like.device, requires_grad=True)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if "lr" in settings:
            settings["lr"] = settings["lr"] * 0 + 0.1  # a warmup starts at 0, where nothing moves
        parameters.append(parameter)
        groups.append({**settings, "params": [parameter]})
    accepted = inspect.signature(cls).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return cls(groups, **settings), parameters


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
