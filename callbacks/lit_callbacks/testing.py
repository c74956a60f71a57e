"""Rehearse a run: put faults into it at chosen steps, and see what the callbacks make of them."""

import copy
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset, IterableDataset

from lit_callbacks._errors import SetupError
from lit_callbacks._facts import has_scaler
from lit_callbacks._member import Member
from lit_callbacks._names import clean_name
from lit_callbacks._replay import of_an_earlier_step

Kind = Literal[
    "nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "nan_activation", "nan_weight", "nan_optimizer_state",
    "bit_flip", "learning_rate", "shuffled_labels", "random_tokens", "constant_tokens", "exploding_batch", "data_error",
]  # fmt: skip

_LOSS = ("nan_loss", "inf_loss")
_GRADIENT = ("nan_gradient", "inf_gradient")
_WEIGHT = ("nan_weight", "nan_optimizer_state", "bit_flip")
_BATCH = ("shuffled_labels", "random_tokens", "constant_tokens", "exploding_batch")
_LABELS = ("labels", "label", "targets", "target", "y")
_NO_IDS = re.compile("mask|position|segment|type")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
T = TypeVar("T")


class InjectedDataError(RuntimeError):
    """A sample could not be read, because of a ``data_error``."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when. It lasts for whole optimizer steps, with all their micro-batches.

    What each kind does:
        nan_loss, inf_loss: the loss that ``training_step`` returns is NaN or +inf, and the gradient no longer finite.
        nan_gradient, inf_gradient: one element of a parameter's gradient, as it leaves the step's first backward pass
            that reaches the parameter: before it is accumulated, averaged over ranks, unscaled and clipped.
        nan_activation: all that a module returns.
        nan_weight: one element of a parameter, before the step's first forward pass.
        bit_flip: the top exponent bit of one element of a parameter, at the same time: in fp32 bit 30, which makes a
            weight below 1 larger by 2**128; in bf16, fp16 and fp64 their own.
        nan_optimizer_state: the first element of each tensor that an optimizer keeps for a parameter, at the same time.
        learning_rate: times ``factor``, for the update alone: neither ``training_step`` nor schedules see it.
        shuffled_labels: what is under ``labels``, ``targets`` or ``y``, or is the last tensor of a tuple, is permuted
            over all positions that are not -100; if it is floating-point, over samples.
        random_tokens, constant_tokens: integer tensors of at least two dimensions are drawn anew from the range of
            their ids, or filled with one id; so are labels that are tokens. Negative ids, and what is named mask,
            position, segment or type, stay.
        exploding_batch: floating-point tensors but masks times ``factor``. If there are none, the output of the first
            module without children that runs and has parameters (an embedding, usually) instead.
        data_error: a sample of a dataset from :meth:`FaultInjector.wrap` raises :class:`InjectedDataError` when read.

    Args:
        kind: One of the above.
        step: The optimizer step it begins at, as ``trainer.global_step`` counts; not for ``data_error``.
        n_steps: How many steps it covers; for ``data_error``, how many readings of the sample fail.
        factor: For ``learning_rate`` and ``exploding_batch``.
        where: Glob over parameter names, or for ``nan_activation`` over module names, without wrapper prefixes. The
            first parameter that matches is struck, or the first such module to run; by default the matrix in the middle
            of the model, or the first module without children that runs, has parameters, and is in its second half.
        rank: The process it happens in; None for all.
        index: The sample, for ``data_error`` only.

    Raises:
        ValueError: If an argument is out of range, or given to a kind that does not use it.

    Example:
        >>> print(Fault("learning_rate", step=240, n_steps=3, factor=60.0))
        learning_rate at step 240 to 242
    """

    kind: Kind
    step: int | None = None
    _: KW_ONLY
    n_steps: int = 1
    factor: float = 100.0
    where: str | None = None
    rank: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        used, unused = ("index", "step") if self.kind == "data_error" else ("step", "index")
        lowest = 1 if self.kind == "nan_optimizer_state" else 0  # before its first step an optimizer has none
        if (value := getattr(self, used)) is None or value < lowest:
            raise ValueError(f"{used} must be at least {lowest} for {self.kind}, got {value!r}")
        if (value := getattr(self, unused)) is not None:
            raise ValueError(f"{unused} must be None for {self.kind}, got {value!r}")
        if self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {self.n_steps!r}")
        if not math.isfinite(self.factor):
            raise ValueError(f"factor must be finite, got {self.factor!r}")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank!r}")
        has_place = self.kind in (*_GRADIENT, *_WEIGHT, "nan_activation")
        if self.where is not None and not (self.where and has_place):
            raise ValueError(f"where must be {'a glob' if has_place else 'None'} for {self.kind}, got {self.where!r}")

    def __str__(self) -> str:
        at = f"sample {self.index}" if self.step is None else f"step {self.step}"
        to = f" to {self.step + self.n_steps - 1}" if self.step is not None and self.n_steps > 1 else ""
        return f"{self.kind} at {at}{to}{'' if self.rank is None else f' on rank {self.rank}'}"

    def covers(self, step: int) -> bool:
        """Whether it happens in this optimizer step."""
        return self.step is not None and self.step <= step < self.step + self.n_steps


class FaultInjector(Member):
    """Make a run go wrong, on purpose, where and when it should.

    It goes before all other callbacks of this package, wherever in the list it is. Batches are replaced, never written
    to, so the data stays what it is. Random choices follow from ``seed`` and the step, are the same on all ranks, and
    leave the global generators alone. Every ``fit`` is a new rehearsal. In manual optimization ``global_step`` counts
    the steps of all optimizers; all faults but those of the learning rate must cover the step a batch begins at.

    Args:
        faults: What is to happen.
        seed: Of all random choices.

    Raises:
        ValueError: If two faults are equal; at setup under a strategy that shards gradients; at fit start if a glob
            matches nothing or, in manual optimization, for faults of the loss; in its step, if a fault finds nothing
            to strike.

    State: none.

    Cost: none but in a step whose fault is in a module's output, which runs eagerly if it is compiled.

    Example:
        >>> injector = FaultInjector([Fault("nan_loss", step=5)])
        >>> trainer = Trainer(callbacks=[*lit_callbacks.recommended(), injector])  # doctest: +SKIP
        >>> trainer.fit(module, data)  # doctest: +SKIP
        >>> injector.assert_all_fired()
        Traceback (most recent call last):
        AssertionError: These faults did not fire as often as they should: nan_loss at step 5 (0 of 1)
    """

    order = -1

    def __init__(self, faults: Sequence[Fault], seed: int = 0) -> None:
        if again := [fault for fault, n in Counter(faults).items() if n > 1]:
            raise ValueError(f"faults must be different, got {again[0]} more than once")
        self.faults, self.seed = list(faults), seed
        self._rank, self._world_size = 0, 1
        self._struck: set[tuple[Fault, int]] = set()
        self._readings = self._no_readings()
        self._undo: list[Callable[[], Any]] = []

    def _no_readings(self) -> Tensor:
        """Rows: readings still to fail, and those that have failed; shared with the workers of a data loader."""
        readings = torch.zeros(2, len(self.faults), dtype=torch.int64)
        return readings.share_memory_() if any(fault.index is not None for fault in self.faults) else readings

    @property
    def fired(self) -> dict[Fault, int]:
        """In how many steps (readings, for ``data_error``) of the last fit each fault has struck, on this rank."""
        steps = Counter(fault for fault, _ in self._struck)
        return {f: steps[f] + n for f, n in zip(self.faults, self._readings[1].tolist(), strict=True)}

    def assert_all_fired(self) -> None:
        """Make sure that the rehearsal was one.

        Raises:
            AssertionError: If a fault did not fire as often as it should. Those of other ranks are for these to check.
        """
        elsewhere = {f for f in self.faults if not self._is_here(f) and (f.rank or 0) < self._world_size}
        missing = [f"{f} ({n} of {f.n_steps})" for f, n in self.fired.items() if n < f.n_steps and f not in elsewhere]
        if missing:
            raise AssertionError(f"These faults did not fire as often as they should: {', '.join(missing)}")

    def wrap(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """A map-style dataset like this one, with the ``data_error`` faults of this injector while a fit lasts."""
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"dataset must be map-style, for samples to have an index, got {type(dataset).__name__}")
        return _FailingDataset(dataset, self)

    def _read(self, indices: Any) -> None:
        for i, fault in enumerate(self.faults):
            if fault.index is not None and self._readings[0, i] > 0 and fault.index in indices:
                self._readings[0, i] -= 1
                self._readings[1, i] += 1
                raise InjectedDataError(f"sample {fault.index} cannot be read: a data_error was injected")

    def _is_here(self, fault: Fault) -> bool:
        return fault.rank in (None, self._rank)

    def _due(self, step: int, *kinds: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.kind in kinds and fault.covers(step) and self._is_here(fault)]

    def _generator(self, step: int) -> Generator:
        return Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new rehearsal."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._rank, self._world_size, self._struck = trainer.global_rank, trainer.world_size, set()
            self._readings = self._no_readings()
            for i, fault in enumerate(self.faults):
                self._readings[0, i] = fault.n_steps if fault.index is not None and self._is_here(fault) else 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot happen in this run."""
        for fault in self.faults:
            if fault.kind in _LOSS and not pl_module.automatic_optimization:
                raise SetupError(
                    f"{fault.kind} changes what training_step returns, which manual optimization does not look at. Use "
                    "nan_activation or nan_gradient."
                )
            if fault.where is not None:
                of_module = fault.kind == "nan_activation"
                _matching(fault, pl_module.named_modules() if of_module else pl_module.named_parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Strike what is there before the forward pass, and prepare what the passes will meet."""
        self._release()
        step = trainer.global_step
        for fault in self._due(step, *_WEIGHT, *_GRADIENT):
            if (fault, step) in self._struck:
                continue
            if fault.kind in _GRADIENT:
                parameter = _parameter(fault, pl_module, lambda p: p.requires_grad)
                self._undo.append(parameter.register_hook(partial(self._spoil_gradient, fault, step)).remove)
            else:
                _damage(fault, pl_module, trainer.optimizers, self._generator(step))
                self._struck.add((fault, step))
        if faults := self._due(step, *_LOSS, *_BATCH, "nan_activation"):
            self._wrap_training_step(pl_module, faults, step)

    def _spoil_gradient(self, fault: Fault, step: int, gradient: Tensor) -> Tensor | None:
        if (fault, step) in self._struck:
            return None
        self._struck.add((fault, step))
        gradient = gradient.clone()
        gradient[_place(gradient, self._generator(step))] = _value(fault)
        return gradient

    def _wrap_training_step(self, pl_module: LightningModule, faults: list[Fault], step: int) -> None:
        original, own = pl_module.training_step, vars(pl_module).get("training_step")

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if of_an_earlier_step.get():
                return original(batch, *args, **kwargs)
            with ExitStack() as stack:
                for fault in faults:
                    if fault.kind in _BATCH and (spoiled := _spoiled(fault, batch, self._generator(step))) is not None:
                        batch = spoiled
                        self._struck.add((fault, step))
                    elif fault.kind not in _LOSS:
                        self._hook_outputs(stack, fault, step, pl_module)
                output = original(batch, *args, **kwargs)
            for fault in self._due(step, *_LOSS):
                if output is not None:
                    output = _spoiled_loss(output, _value(fault))
                    self._struck.add((fault, step))
            return output

        def put_back() -> None:
            if own is None:
                del pl_module.training_step
            else:  # a compiled module has one of its own
                pl_module.training_step = own  # type: ignore[method-assign]

        # Lightning asks for the signature, and looks through one wrapper.
        vars(training_step)["__wrapped__"] = getattr(original, "__wrapped__", original)
        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo.append(put_back)

    def _hook_outputs(self, stack: ExitStack, fault: Fault, step: int, pl_module: LightningModule) -> None:
        factor = math.nan if fault.kind == "nan_activation" else fault.factor
        first: list[nn.Module] = []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensors = [tensor for _, tensor in _tensors(output)]
            if module not in (first or [module]) or not any(tensor.is_floating_point() for tensor in tensors):
                return output
            first.append(module)
            self._struck.add((fault, step))
            return _replaced(output, (t * factor if t.is_floating_point() else t for t in tensors))

        for module in _modules(fault, pl_module):  # ahead of the hooks of those who look
            stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        # Compiled code does not see new hooks; where nobody has imported the compiler, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Change the learning rate until the optimizer has stepped."""
        step = trainer.global_step
        faults = [fault for fault in self._due(step, "learning_rate") if (fault, step) not in self._struck]
        if not faults:
            return
        factor = math.prod(fault.factor for fault in faults)
        saved: list[tuple[dict[str, Any], Any, Any]] = []

        def change(*_: Any) -> None:
            if trainer.global_step == step:
                self._struck.update((fault, step) for fault in faults)
                saved.extend((group, group["lr"], group["lr"] * factor) for group in optimizer.param_groups)
                for group, _, faulty in saved:
                    group["lr"] = faulty

        def restore(stepped: Optimizer = optimizer, *_: Any) -> None:
            while saved and stepped is optimizer:
                group, right, faulty = saved.pop()
                if group["lr"] is faulty:  # else another callback has put back what it had found before
                    group["lr"] = right

        # Hooks for all optimizers run after those of one, where other callbacks put back what they have changed.
        self._undo += [restore, register_optimizer_step_post_hook(restore).remove]
        # A scaler that finds an overflow does not step, so nothing would undo the change before the schedule looks; but
        # its pre-hooks run after the backward pass. Without a scaler they run before the forward pass, too early.
        if has_scaler(trainer):
            self._undo.append(optimizer.register_step_pre_hook(change).remove)
        else:
            change()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take everything back."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything back."""
        super().teardown(trainer, pl_module, stage)
        self._release()
        self._readings[0] = 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything back."""
        super().on_exception(trainer, pl_module, exception)
        self._release()
        self._readings[0] = 0

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()


class _FailingDataset(Dataset[Any]):
    """Asks the injector before it reads. In a worker both are copies, but their counts are shared."""

    def __init__(self, dataset: Any, injector: FaultInjector) -> None:
        self.dataset, self.injector = dataset, injector

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        self.injector._read(index if hasattr(index, "__contains__") else [index])
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        self.injector._read(indices)
        together = getattr(self.dataset, "__getitems__", None)
        return together(indices) if together else [self.dataset[index] for index in indices]


def _matching(fault: Fault, named: Iterable[tuple[str, T]]) -> list[T]:
    things = [(clean_name(name), thing) for name, thing in named]
    found = [thing for name, thing in things if fault.where is None or fnmatchcase(name, fault.where)]
    if not found:
        names = [name for name, _ in things if name]
        there = ", ".join(names[:3]) + (", …" if len(names) > 3 else "") or "nothing (optimizers have state later)"
        raise SetupError(f"{fault} finds nothing to strike: where is {fault.where!r}, and there is {there}")
    return found


def _parameter(fault: Fault, module: nn.Module, usable: Callable[[Tensor], bool]) -> Tensor:
    found = _matching(fault, ((n, p) for n, p in module.named_parameters() if p.is_floating_point() and usable(p)))
    if fault.where is not None:
        return found[0]
    found = [parameter for parameter in found if parameter.dim() >= 2] or found
    return found[len(found) // 2]


def _modules(fault: Fault, module: nn.Module) -> list[nn.Module]:
    """The first of these to run is struck: not the first of all, as attention's ``out_proj`` for one never runs."""
    found = _matching(fault, module.named_modules())
    if fault.where is not None:
        return found
    leaves = [m for m in found if len([*m.modules()]) == 1 and [*m.parameters()]]
    return leaves[len(leaves) // 2 :] if fault.kind == "nan_activation" else leaves


@torch.no_grad()
def _damage(fault: Fault, module: nn.Module, optimizers: Sequence[Optimizer], generator: Generator) -> None:
    states = {
        id(parameter): [tensor for _, tensor in _tensors(state) if tensor.is_floating_point() and tensor.dim()]
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }
    if fault.kind == "nan_optimizer_state":
        for tensor in states[id(_parameter(fault, module, lambda p: bool(states.get(id(p)))))]:
            tensor[(0,) * tensor.dim()] = math.nan
        return
    parameter = _parameter(fault, module, lambda _: True)
    place = _place(parameter, generator)
    if fault.kind == "nan_weight":
        parameter[place] = math.nan
    else:
        bits = parameter.view(_INTEGERS[parameter.element_size()])
        bits[place] ^= 1 << (8 * parameter.element_size() - 2)  # in front of it is only the sign


def _place(tensor: Tensor, generator: Generator) -> tuple[int, ...]:
    return tuple(int(torch.randint(size, (), generator=generator)) for size in tensor.shape)


def _value(fault: Fault) -> float:
    return math.inf if fault.kind.startswith("inf") else math.nan


def _spoiled_loss(output: Any, value: float) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": _spoiled_loss(output["loss"], value)}
    return (output - output.detach() + 1) * value  # not loss * inf, which is NaN for 0 and -inf for negative losses


def _tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, tuples and lists, with the key it is under."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, str(key))
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value, name)


def _replaced(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of :func:`_tensors`."""
    if isinstance(batch, Tensor):
        return next(tensors)
    if isinstance(batch, Mapping):
        copied: Any = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = _replaced(value, tensors)
        return copied
    if isinstance(batch, tuple | list):
        values = [_replaced(value, tensors) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _spoiled(fault: Fault, batch: Any, generator: Generator) -> Any:
    """A batch like this one, with the fault in it, or None if an ``exploding_batch`` has nothing to explode.

    Nothing is written to: tensors may be views of the data set.
    """
    named = list(_tensors(batch))
    if isinstance(batch, tuple | list) and len(named) > 1 and not any(name in _LABELS for name, _ in named):
        named[-1] = ("labels", named[-1][1])
    tensors = [tensor for _, tensor in named]
    chosen = [i for i, (name, tensor) in enumerate(named) if _concerns(fault, name, tensor)]
    if not chosen and fault.kind == "exploding_batch":
        return None
    if not chosen:
        found = ", ".join(f"{name} {[*tensor.shape]} {tensor.dtype}".strip() for name, tensor in named)
        raise SetupError(
            f"{fault} finds nothing to change in a batch of {found or type(batch).__name__}. Labels are what is under "
            f"{', '.join(_LABELS)}, or the last tensor of a tuple; tokens are integers, in two dimensions or more."
        )
    like = tensors[chosen[0]] if fault.kind == "constant_tokens" else None
    for i in chosen:
        if fault.kind == "exploding_batch":
            tensors[i] = tensors[i] * fault.factor
        elif fault.kind == "shuffled_labels":
            tensors[i] = _shuffled(tensors[i], generator)
        else:
            tensors[i] = _garbage(tensors[i], like, generator)
    return _replaced(batch, iter(tensors))


def _concerns(fault: Fault, name: str, tensor: Tensor) -> bool:
    if fault.kind == "exploding_batch":
        return tensor.is_floating_point() and "mask" not in name
    if fault.kind == "shuffled_labels":
        return name in _LABELS
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return is_integer and tensor.dim() >= 2 and not _NO_IDS.search(name) and bool((tensor >= 0).any())


def _shuffled(labels: Tensor, generator: Generator) -> Tensor:
    counts = torch.ones(len(labels), dtype=torch.bool) if labels.is_floating_point() else labels != -100
    result, values = labels.clone(), labels[counts]
    result[counts] = values[torch.randperm(len(values), generator=generator)]
    return result


def _garbage(tokens: Tensor, like: Tensor | None, generator: Generator) -> Tensor:
    """Random ids, or the first id of ``like`` if it may be one of these: labels may have a vocabulary of their own."""
    ids = tokens[tokens >= 0]
    low, high = int(ids.min()), int(ids.max())
    if like is not None:
        constant = int(like[like >= 0][0])
        low = high = constant if low <= constant <= high else low
    drawn = torch.randint(low, high + 1, tokens.shape, generator=generator).to(tokens)
    return torch.where(tokens >= 0, drawn, tokens)
