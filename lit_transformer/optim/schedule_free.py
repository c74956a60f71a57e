"""Optimizers that train other weights than they evaluate: which ones are where, and when."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_KEY = "schedule_free"


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether an optimizer has two sets of weights to switch between.

    Example:
        >>> import torch
        >>> is_schedule_free(torch.optim.AdamW([torch.ones(1)]))
        False
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


class AveragedWeights:
    """The two sets of weights of a schedule-free optimizer (Defazio et al. 2024).

    Gradients are taken at one point, ``y``; the result of training is the average, ``x``, which takes the place of a
    decaying learning rate. The optimizer's own ``eval()`` and ``train()`` compute one from the other in place, with
    rounding errors that would stay; here ``y`` comes back to the bit. It does not from a checkpoint in parts, which has
    ``x`` alone, and the optimizer's states: from these ``y`` is computed.

    Args:
        optimizer: One with ``train()`` and ``eval()``, such as pytorch-optimizer's ``ScheduleFreeAdamW``.

    Cost: a copy of the weights while the average is in place, and three passes over them per switch.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._trained: dict[int, Tensor] | None = None  # by the parameter's id
        self._optimizer.train()

    def go_on(self) -> None:
        """The weights that are trained, where a checkpoint had the average alone."""
        if self._trained is None:
            self._optimizer.train()

    def put_in_place(self) -> None:
        """The average, for evaluation."""
        if self._trained is None:
            self.go_on()
            self._trained = {id(p): p.detach().clone() for p in self._parameters()}
            self._optimizer.eval()

    def take_out(self) -> None:
        """The weights that are trained, as they were."""
        if self._trained is not None:
            self._optimizer.train()
            for parameter in self._parameters():
                parameter.detach().copy_(self._trained[id(parameter)])
            self._trained = None

    def save(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint's weights be the average; what is needed to go on stands beside it."""
        evaluating = self._trained is not None
        self.put_in_place()
        assert self._trained is not None
        going_on = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in self._trained and name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = parameter.detach().clone()
                going_on[name] = self._trained[id(parameter)]
        if not evaluating:
            self.take_out()
        in_parts = any(isinstance(tensor, DTensor) for tensor in going_on.values())
        if "optimizer_states" in checkpoint:
            if not in_parts:
                checkpoint[_KEY] = going_on
            for group in (group for state in checkpoint["optimizer_states"] for group in state["param_groups"]):
                group["train_mode"] = not in_parts

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]


def go_on(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint's weights be those that were trained."""
    if trained := checkpoint.pop(_KEY, None):
        checkpoint["state_dict"].update(trained)
