"""A checkpoint that DeepSpeed saved in parts, put together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transformer.errors import UsageError

Shapes = Mapping[str, torch.Size]
Flat = Sequence[Tensor]  # of one rank, a vector for each group

# What the engine writes beside what Lightning does.
_ENGINE = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
}  # fmt: skip


def is_of_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed saved it."""
    return (folder / "latest").is_file()


def whole(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint of ZeRO, as one that was saved by a single process in full precision.

    Args:
        folder: The checkpoint. Its optimizer states are read with pickle: of a checkpoint that is trusted only.

    Raises:
        UsageError: If DeepSpeed, whose classes are in there, is not installed.

    Cost: all of it in memory, twice.
    """
    tag = folder / (folder / "latest").read_text().strip()
    models = [torch.load(path, map_location="cpu", weights_only=True) for path in _by_rank(tag, "*model_states.pt")]
    try:
        ranks = [
            torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
            for path in _by_rank(tag, "*optim_states.pt")
        ]
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{folder} was saved by DeepSpeed and cannot be read without it: pip install deepspeed ({error})"
        ) from None
    model = models[0]
    assemble = _Assembly(model["param_shapes"], ranks)
    weights = {name: value.float() if value.is_floating_point() else value for name, value in model["module"].items()}
    for name, shape in (model["frozen_param_shapes"] or {}).items():
        parts = [other["frozen_param_fragments"][name] for other in models[: None if assemble.is_stage_3 else 1]]
        weights[name] = torch.cat([part.flatten() for part in parts])[: shape.numel()].view(shape).float()
    weights |= assemble(ranks, "fp32_flat_groups" if assemble.is_stage_3 else "single_partition_of_fp32_groups")
    weights |= {alias: weights[name] for alias, name in model["shared_params"].items()}
    lightning = {key: value for key, value in model.items() if key not in _ENGINE}
    return {**lightning, "state_dict": weights, "optimizer_states": [assemble.optimizer(ranks)]}


class _Assembly:
    """Puts the ranks' vectors together.

    Stages 1 and 2 lay a group's parameters end to end and cut that; stage 3 cuts each parameter, and lays a rank's
    pieces end to end.

    Args:
        shapes: Of the parameters of each group, in order.
        ranks: The optimizer's states of each rank.
    """

    def __init__(self, shapes: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> None:
        self.shapes = shapes
        self.is_stage_3 = int(ranks[0]["zero_stage"]) == 3
        self._gaps = ranks[0].get("param_alignment_paddings")

    def __call__(self, ranks: Sequence[Mapping[str, Any]], key: str) -> dict[str, Tensor]:
        return self.join([rank[key] for rank in ranks])

    def join(self, parts: Sequence[Flat]) -> dict[str, Tensor]:
        """Whole tensors by parameter, of what each rank has."""
        return dict(self._pieces(parts) if self.is_stage_3 else self._slices(parts))

    def _slices(self, parts: Sequence[Flat]) -> Iterator[tuple[str, Tensor]]:
        for group, shapes in enumerate(self.shapes):
            vector, start = torch.cat([part[group] for part in parts]), 0
            for i, (name, shape) in enumerate(shapes.items()):
                yield name, vector[start : start + shape.numel()].view(shape).clone()
                start += shape.numel() + (self._gaps[group][i] if self._gaps else 0)

    def _pieces(self, parts: Sequence[Flat]) -> Iterator[tuple[str, Tensor]]:
        vectors, start = [torch.cat([*part]) for part in parts], 0
        for name, shape in (item for shapes in self.shapes for item in shapes.items()):
            end = start + math.ceil(shape.numel() / len(parts))
            yield name, torch.cat([vector[start:end] for vector in vectors])[: shape.numel()].view(shape)
            start = end

    def optimizer(self, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state of the torch optimizer inside, parameters numbered in the order of the groups."""
        inside = [rank["optimizer_state_dict" if self.is_stage_3 else "base_optimizer_state"] for rank in ranks]
        parts = [[state["state"][i] for i in sorted(state["state"])] for state in inside]
        names = [name for shapes in self.shapes for name in shapes]
        states: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key, value in (parts[0][0] if parts[0] else {}).items():
            if isinstance(value, Tensor) and value.dim():
                for name, joined in self.join([[group[key] for group in part] for part in parts]).items():
                    states[name][key] = joined
            else:  # a count, the same of all
                for name in names:
                    states[name][key] = value
        numbers = {name: i for i, name in enumerate(names)}
        groups = [
            {**group, "params": [numbers[name] for name in shapes]}
            for group, shapes in zip(inside[0]["param_groups"], self.shapes, strict=True)
        ]
        return {"state": {numbers[name]: state for name, state in states.items() if state}, "param_groups": groups}


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern), key=lambda path: [int(n) for n in path.name.split("_") if n.isdigit()])
    if not paths:
        raise UsageError(f"{folder} has no {pattern}: it is no checkpoint of ZeRO stage 1, 2 or 3")
    return paths
