"""Rehearse a run: put faults into it at chosen steps, and see what the callbacks make of them."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset, IterableDataset

from lit_callbacks._errors import SetupError
from lit_callbacks._facts import has_scaler
from lit_callbacks._failing_dataset import FailingDataset, InjectedDataError
from lit_callbacks._fault import BATCH, GRADIENT, LOSS, WEIGHT, Fault
from lit_callbacks._member import Member
from lit_callbacks._replay import of_an_earlier_step
from lit_callbacks._spoiling import (
    damage,
    matching,
    modules_of,
    parameter_of,
    place_in,
    replaced,
    spoiled,
    spoiled_loss,
    tensors_of,
    value_of,
)

__all__ = ["Fault", "FaultInjector", "InjectedDataError"]


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
        return FailingDataset(dataset, self._read)

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
            if fault.kind in LOSS and not pl_module.automatic_optimization:
                raise SetupError(
                    f"{fault.kind} changes what training_step returns, which manual optimization does not look at. Use "
                    "nan_activation or nan_gradient."
                )
            if fault.where is not None:
                of_module = fault.kind == "nan_activation"
                matching(fault, pl_module.named_modules() if of_module else pl_module.named_parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Strike what is there before the forward pass, and prepare what the passes will meet."""
        self._release()
        step = trainer.global_step
        for fault in self._due(step, *WEIGHT, *GRADIENT):
            if (fault, step) in self._struck:
                continue
            if fault.kind in GRADIENT:
                parameter = parameter_of(fault, pl_module, lambda p: p.requires_grad)
                self._undo.append(parameter.register_hook(partial(self._spoil_gradient, fault, step)).remove)
            else:
                damage(fault, pl_module, trainer.optimizers, self._generator(step))
                self._struck.add((fault, step))
        if faults := self._due(step, *LOSS, *BATCH, "nan_activation"):
            self._wrap_training_step(pl_module, faults, step)

    def _spoil_gradient(self, fault: Fault, step: int, gradient: Tensor) -> Tensor | None:
        if (fault, step) in self._struck:
            return None
        self._struck.add((fault, step))
        gradient = gradient.clone()
        gradient[place_in(gradient, self._generator(step))] = value_of(fault)
        return gradient

    def _wrap_training_step(self, pl_module: LightningModule, faults: list[Fault], step: int) -> None:
        original, own = pl_module.training_step, vars(pl_module).get("training_step")

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if of_an_earlier_step.get():
                return original(batch, *args, **kwargs)
            with ExitStack() as stack:
                for fault in faults:
                    if fault.kind in BATCH and (bad := spoiled(fault, batch, self._generator(step))) is not None:
                        batch = bad
                        self._struck.add((fault, step))
                    elif fault.kind not in LOSS:
                        self._hook_outputs(stack, fault, step, pl_module)
                output = original(batch, *args, **kwargs)
            for fault in self._due(step, *LOSS):
                if output is not None:
                    output = spoiled_loss(output, value_of(fault))
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
            tensors = [tensor for _, tensor in tensors_of(output)]
            if module not in (first or [module]) or not any(tensor.is_floating_point() for tensor in tensors):
                return output
            first.append(module)
            self._struck.add((fault, step))
            return replaced(output, (t * factor if t.is_floating_point() else t for t in tensors))

        for module in modules_of(fault, pl_module):  # ahead of the hooks of those who look
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
