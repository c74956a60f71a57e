"""Strategies for models in parts: FSDP2, tensor parallelism, and both."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lit_transformer.checkpoint_files import read_checkpoint
from lit_transformer.errors import UsageError
from lit_transformer.optim.schedule_free import go_on
from lit_transformer.strategies.tensor_parallel import part_of, reordered, stacked_orders


class TensorParallel(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with groups of devices that share the work of every block.

    Those of a group see the same batch; with more devices than one group, FSDP2 is over the groups. Also as
    ``strategy="tensor_parallel"``, of 2.

    Args:
        tensor_parallel_size: Devices in a group, of one machine: they exchange activations twice a sub-layer.
        save_distributed_checkpoint: Whether a checkpoint is a folder with each rank's part, which may be loaded on
            another number of ranks; else one file, that the first rank collects.

    Raises:
        ValueError: If ``tensor_parallel_size`` is below 1.
        UsageError: Likewise, if the devices of a machine cannot be split into such groups; from the Trainer.
    """

    def __init__(self, tensor_parallel_size: int = 2, save_distributed_checkpoint: bool = True) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size, save_distributed_checkpoint=save_distributed_checkpoint
        )
        self.group_size = tensor_parallel_size
        self.saves_parts = save_distributed_checkpoint

    def _configure_launcher(self) -> None:
        """Check what the Trainer has just said, before any other process is started."""
        if self.num_processes % self.group_size:
            raise UsageError(
                f"tensor_parallel_size must divide the number of devices of a machine, got {self.group_size} and "
                f"{self.num_processes}; set tensor_parallel_size or trainer.devices"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        """Lightning's own default is one group per machine."""
        self._data_parallel_size = self.num_nodes * self.num_processes // self.group_size
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With rows in the order that they have in a model that is not cut, so that any strategy goes on from it."""
        weights = super().lightning_module_state_dict()
        return weights | {
            name: reordered(weights[name], order.argsort())
            for name, order in self._orders().items()
            if name in weights  # of one file, ranks other than the first have nothing
        }

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise."""
        state = super().optimizer_state(optimizer)
        _reorder(state.get("state", {}), {name: order.argsort() for name, order in self._orders().items()})
        return state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer states, from parts or from one file, whatever strategy has saved them."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():
            return self._load_file(path)
        contents = super().load_checkpoint(path, weights_only)
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        by_parameter = {parameters[name]: order for name, order in self._orders().items()}
        with torch.no_grad():
            for parameter, order in by_parameter.items():
                parameter.copy_(reordered(parameter, order))
        for optimizer in self.optimizers:
            _reorder(optimizer.state, by_parameter)
        return contents

    def _load_file(self, path: Path) -> dict[str, Any]:
        """Not Lightning's way, which takes the numbers in an optimizer's state for places in the module."""
        contents = read_checkpoint(path)
        assert self.model is not None
        assert self.lightning_module is not None
        if self.optimizers:
            go_on(contents)  # of a schedule-free optimizer, by the weights that were trained
        own, orders = self.model.state_dict(), self._orders()
        missing = own.keys() - contents["state_dict"].keys()
        if self.lightning_module.strict_loading and (missing or contents["state_dict"].keys() - own.keys()):
            other = f"no {min(missing)}" if missing else min(contents["state_dict"].keys() - own.keys())
            raise UsageError(f"{path} is of another architecture: it has {other}")
        if self.optimizers and "optimizer_states" not in contents:
            raise UsageError(f"{path} has weights only; take them by model.init_args.init_from")
        with torch.no_grad():
            for name in own.keys() - missing:
                tensor = own[name]
                whole = contents["state_dict"][name]
                tensor.copy_(part_of(whole[orders[name]] if name in orders else whole, tensor))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(
            self.optimizers, contents["optimizer_states"] if self.optimizers else [], strict=True
        ):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            saved = sum(len(group["params"]) for group in state["param_groups"])
            if saved != len(parameters):
                raise UsageError(
                    f"the checkpoint's optimizer has {saved} parameters, and this run trains {len(parameters)}: go on "
                    "with the param_groups that it was saved with"
                )
            for number, values in state["state"].items():
                order = orders.get(names[parameters[number]])
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                        values[key] = part_of(value if order is None else value[order], parameters[number])
            optimizer.load_state_dict(state)
        return contents

    def _orders(self) -> dict[str, Tensor]:
        assert self.model is not None
        return stacked_orders(self.model)


class FSDP2(TensorParallel):
    """Fully sharded data parallelism over all devices: ``ModelParallelStrategy`` without a size to set.

    Also as ``strategy="fsdp2"``.

    Args:
        save_distributed_checkpoint: As of :class:`TensorParallel`.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(1, save_distributed_checkpoint)


StrategyRegistry.register("fsdp2", FSDP2, description="Parameters, gradients and optimizer states in parts")
StrategyRegistry.register("tensor_parallel", TensorParallel, description="Each block's work shared by two devices")


def _reorder(states: Any, orders: dict[Any, Tensor]) -> None:
    """Reorder what an optimizer knows of each row."""
    for parameter, order in orders.items():
        for key, value in states.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() and len(value) == len(order):
                states[parameter][key] = reordered(value, order)
