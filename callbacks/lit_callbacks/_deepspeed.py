"""Where DeepSpeed's ZeRO keeps gradients, weights and states, and how its step is passed over: nobody else here knows.

ZeRO cuts the parameters of a group, laid end to end, into one part for each rank (Rajbhandari et al. 2020, *ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models*). What belongs to a parameter on this rank is a slice of
its part, and may be empty. Names that begin with ``_`` below are DeepSpeed's own (0.19); :func:`missing` looks for them
before training begins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

_OF_STAGES_1_AND_2 = ("_global_grad_norm", "check_grad_overflow", "has_overflow", "_update_scale", "clip_grad")
_OF_STAGE_3 = (
    "fp32_partitioned_groups_flat", "get_local_fp32_grad_for_param", "get_local_fp32_param", "_pre_step",
    "_partition_all_parameters", "_overflow_clean_up", "_global_grad_norm", "swap_optimizer", "params_in_nvme_and_cpu",
    "clip_grad",
)  # fmt: skip


def engine_of(trainer: Trainer) -> Any | None:
    """DeepSpeed's engine with its ZeRO optimizer, from the start of fit on; None under other strategies."""
    engine: Any = trainer.strategy.model
    return engine if type(engine).__name__ == "DeepSpeedEngine" and hasattr(engine.optimizer, "overflow") else None


def is_zero(optimizer: object) -> bool:
    """Whether an optimizer is one of ZeRO's, around a torch optimizer that sees this rank's part alone."""
    return type(optimizer).__name__.startswith("DeepSpeedZeroOptimizer")


def missing(engine: Any) -> list[str]:
    """What this version of DeepSpeed, or this setting of it, does not have of what is needed here."""
    zero = engine.optimizer
    if not is_zero(zero):
        return [f"a ZeRO optimizer in place of {type(zero).__name__}"]
    if _is_stage_3(zero):
        absent = [name for name in _OF_STAGE_3 if not hasattr(zero, name)]
        if not absent and (zero.swap_optimizer or zero.params_in_nvme_and_cpu):
            return ["weights and optimizer states in memory, not on NVMe"]
        return absent
    mapped = all(hasattr(parameter, "_hp_mapping") for parameter in trained(engine))
    return [name for name in _OF_STAGES_1_AND_2 if not hasattr(zero, name)] + ([] if mapped else ["_hp_mapping"])


def step_follows(trainer: Trainer) -> bool:
    """Whether the optimizer steps now: under DeepSpeed, Lightning asks it to after every micro-batch."""
    engine = engine_of(trainer)
    return engine is None or bool(engine.is_gradient_accumulation_boundary())


def trained(engine: Any) -> list[nn.Parameter]:
    """The module's parameters that the optimizer trains, in the order of the module."""
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def flat_parts(zero: Any) -> list[Tensor]:
    """This rank's part of each group in full precision: what the torch optimizer inside steps on."""
    if _is_stage_3(zero):  # whose groups are empty between steps
        return list(zero.fp32_partitioned_groups_flat)
    return [part for group in zero.param_groups for part in group["params"]]


def gradient_parts(engine: Any) -> list[Tensor]:
    """This rank's slice of each trained parameter's gradient, accumulated and averaged over ranks, before clipping.

    To be asked between the last backward pass and the step. There is no communication.
    """
    zero = engine.optimizer
    parts = [_gradient(zero, parameter) for parameter in trained(engine)]
    return parts if zero.loss_scale == 1 else [part / zero.loss_scale for part in parts]


def weight_parts(engine: Any) -> list[Tensor]:
    """This rank's slice of each trained parameter in full precision, in the same memory."""
    return [_weight(engine.optimizer, parameter) for parameter in trained(engine)]


def part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter that stage 3 has cut, without what fills up the last rank's."""
    return _trim(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]


def is_cut(parameter: Tensor) -> bool:
    """Whether stage 3 has cut the parameter itself."""
    return hasattr(parameter, "ds_tensor")


def shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, on all ranks together."""
    return parameter.ds_shape if is_cut(parameter) else parameter.shape  # type: ignore[attr-defined]


def numel(parameter: Tensor) -> int:
    """Elements of a parameter, on all ranks together."""
    return int(parameter.ds_numel) if is_cut(parameter) else parameter.numel()  # type: ignore[attr-defined]


def ranks_of(parameter: Tensor) -> int:
    """Over how many ranks stage 3 has cut it."""
    return torch.distributed.get_world_size(parameter.ds_process_group)  # type: ignore[attr-defined]


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Have parameters whole inside, those that stage 3 has given up too. All ranks together."""
    absent = [parameter for parameter in parameters if is_cut(parameter) and not parameter.numel()]
    if not absent:
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(absent):
        yield


def settle(trainer: Trainer) -> None:
    """Let stage 3 give up what it has gathered: the next forward pass collects the parts as they are then."""
    engine = engine_of(trainer)
    if engine is not None and _is_stage_3(engine.optimizer):
        engine.optimizer._partition_all_parameters()


def clip_factor(engine: Any) -> float | None:
    """What the step that is just over multiplied the gradient by to clip it; None if it was not taken."""
    if engine.optimizer.overflow:
        return None
    clip = float(engine.optimizer.clip_grad)
    return min(1.0, clip / (float(engine.optimizer._global_grad_norm) + 1e-6)) if clip else 1.0


class _Step:
    """Stands in for a ZeRO optimizer's ``step`` while somebody waits for it, or wants it clipped or passed over."""

    def __init__(self, zero: Any) -> None:
        self.zero, self.step = zero, zero.step
        self.waiting: list[Callable[[], None]] = []
        self.pass_over = False
        self.clip: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass_over, self.pass_over = self.pass_over, False
        configured = self.zero.clip_grad
        if self.clip is not None:
            self.zero.clip_grad, self.clip = self.clip, None
        try:
            if not pass_over:
                self.step(*args, **kwargs)
            elif _is_stage_3(self.zero):
                self._discard_stage_3()
            else:
                self._discard()
            for function in list(self.waiting):
                function()
        finally:
            self.zero.clip_grad = configured  # which goes into checkpoints
        self.close()

    def close(self) -> None:
        if not self.waiting and not self.pass_over and self.clip is None:
            vars(self.zero).pop("step", None)
            _STEPS.pop(self.zero, None)

    def _discard(self) -> None:
        """Let ZeRO find an overflow, for which it drops the gradients; the loss scale stays."""
        own, checks = vars(self.zero), self.zero.check_grad_overflow
        own.update(has_overflow=lambda *_, **__: True, _update_scale=lambda *_, **__: None, check_grad_overflow=True)
        try:
            self.step()
        finally:
            del own["has_overflow"], own["_update_scale"]
            self.zero.check_grad_overflow = checks

    def _discard_stage_3(self) -> None:
        """What stage 3 does on an overflow: it looks for one in fp16 only."""
        self.zero._pre_step()
        self.zero._partition_all_parameters()
        self.zero.overflow = True
        self.zero._overflow_clean_up(self.zero.loss_scale)


_STEPS: "WeakKeyDictionary[Any, _Step]" = WeakKeyDictionary()


def _step_of(zero: Any) -> _Step:
    if zero not in _STEPS:
        _STEPS[zero] = zero.step = _Step(zero)
    return _STEPS[zero]


def pass_over_step(zero: Any) -> None:
    """Make the coming step change neither weights nor optimizer state."""
    _step_of(zero).pass_over = True


def clip_step(zero: Any, max_norm: float) -> None:
    """Make the coming step clip the gradient to a norm, as ZeRO itself does where it is configured to."""
    _step_of(zero).clip = max_norm


class AfterStep:
    """Calls a function when the optimizer has stepped, until it is removed."""

    def __init__(self, zero: Any, function: Callable[[], None]) -> None:
        self._zero, self._function = zero, function
        _step_of(zero).waiting.append(function)

    def remove(self) -> None:
        """Call it no more."""
        step = _STEPS.get(self._zero)
        if step is not None and self._function in step.waiting:
            step.waiting.remove(self._function)
            step.close()


def _is_stage_3(zero: Any) -> bool:
    return type(zero).__name__.endswith("Stage3")


def _gradient(zero: Any, parameter: Any) -> Tensor:
    if is_cut(parameter):
        return _trim(parameter, zero.get_local_fp32_grad_for_param(parameter))
    mapping = parameter._hp_mapping
    if mapping is None:
        return _nothing(parameter)
    gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    return gradient.detach().flatten()


def _weight(zero: Any, parameter: Any) -> Tensor:
    if is_cut(parameter):
        return _trim(parameter, zero.get_local_fp32_param(parameter))
    mapping = parameter._hp_mapping
    weight: Tensor = _nothing(parameter) if mapping is None else mapping.get_hp_fragment()
    return weight.detach()


def _nothing(parameter: Tensor) -> Tensor:
    return torch.zeros(0, device=parameter.device)


def _trim(parameter: Any, part: Tensor) -> Tensor:
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return part.detach().flatten()[: max(0, parameter.ds_numel - rank * part.numel())]
