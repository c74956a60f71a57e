"""The base of observers that look at an optimizer's parameters before and after it has stepped."""

from abc import abstractmethod
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_callbacks._deepspeed import step_follows
from lit_callbacks._groups import ParameterGroups
from lit_callbacks._member import refuse_unknown_engine
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement
from lit_callbacks._shards import whole_shapes
from lit_callbacks._step import after_step


class Step:
    """One measured step of one optimizer.

    Args:
        number: ``trainer.global_step`` before it.
        optimizer: Whose step.
        suffix: What its metric keys end in, where there are several optimizers.
    """

    def __init__(self, number: int, optimizer: Optimizer, suffix: str) -> None:
        self.number, self.optimizer, self.suffix = number, optimizer, suffix
        self.found: dict[str, Any] = {}
        self.hook: Any = None


class StepObserver(Observer):
    """Measures when the gradient is complete and not yet clipped, and again when the optimizer has stepped.

    The second look is an optimizer post-hook that lives for the measured step alone. A step that never happens, because
    a GradScaler found an overflow, has no second look.
    """

    def __init__(self, every_n_steps: int, groups: list[str] | None) -> None:
        super().__init__(every_n_steps)
        if groups is not None and not all(groups):
            raise ValueError(f"groups must be names or globs, got {groups!r}")
        self.groups = groups
        self.parameter_groups: ParameterGroups | None = None
        self._steps: list[Step] = []
        self.step: Step | None = None

    @abstractmethod
    def before(self, trainer: Trainer, step: Step) -> None:
        """Look at the parameters and their unclipped gradients; keep what is found in ``step.found``."""

    @abstractmethod
    def after(self, trainer: Trainer, step: Step) -> None:
        """Look at the parameters and their clipped gradients, right after the step."""

    @abstractmethod
    def found(self, trainer: Trainer, step: Step) -> Measurement:
        """What was found, on this rank. ``self.step`` is the step until the report is made."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sort the parameters into groups; a glob that matches nothing is refused here."""
        refuse_unknown_engine(self, trainer)
        self._group(trainer, pl_module)

    def _group(self, trainer: Trainer, pl_module: LightningModule) -> ParameterGroups:
        by = ["layers", "kinds"] if self.groups is None else self.groups
        self.parameter_groups = ParameterGroups(pl_module, by, whole_shapes(trainer, pl_module))
        return self.parameter_groups

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Due? Look, and arrange to look again."""
        number = trainer.global_step
        if self.off or not step_follows(trainer) or not self.cadence.due(number, id(optimizer)):
            return
        several = len(trainer.optimizers) > 1
        step = Step(number, optimizer, f"_{trainer.optimizers.index(optimizer)}" if several else "")
        self._steps.append(step)
        self.attempt(self.before, trainer, step)
        step.hook = after_step(optimizer, lambda: self.attempt(self.after, trainer, step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the steps of this batch."""
        if self._steps:
            steps = self._steps
            self._forget_steps()
            for step in steps:
                self.step = step
                self.report(trainer, pl_module, step.number, partial(self.found, trainer, step))
            self.step = None

    def _forget_steps(self) -> None:
        for step in self._steps:
            if step.hook is not None:
                step.hook.remove()
        self._steps = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the parameters."""
        super().teardown(trainer, pl_module, stage)
        self._forget_steps()
        self.step = self.parameter_groups = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the parameters."""
        super().on_exception(trainer, pl_module, exception)
        self._forget_steps()
        self.step = self.parameter_groups = None
