"""What observers and actors share: their order, what they refuse, the shared facts, and where their numbers go."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_callbacks._errors import SetupError
from lit_callbacks._facts import forget


class Member(Callback):
    """A callback of this package. Constructor arguments are kept as attributes of the same name."""

    order: int
    """Position among our callbacks in every hook: -1 faults, 0 observers, 1 clipper and autopsy, 2 guards and
    recovery, 3 checkpoints."""

    serves_shards: ClassVar[bool] = False
    """Whether it works where a rank holds a part only of each parameter, as under FSDP2."""

    _state_key: str | None = None

    @property
    def state_key(self) -> str:
        """Made of the constructor arguments, so that two callbacks of a class keep separate states."""
        if self._state_key is None:  # Lightning asks around every hook call, and a signature takes 30 microseconds
            names = inspect.signature(type(self)).parameters
            self._state_key = self._generate_state_key(**{name: getattr(self, name) for name in names})
        return self._state_key

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's bound `log` and `log_dict` on every callback, and the module with them.
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported, and put our callbacks in order."""
        if stage != "fit":
            return
        _refuse_sharded(self, trainer)
        forget(trainer)
        arrange(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the shared facts."""
        forget(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the shared facts: Lightning does not call ``teardown`` after an exception."""
        forget(trainer)


def arrange(trainer: Trainer) -> None:
    """Sort our callbacks by their order within the places they hold; all others stay where they are.

    The list is replaced, not changed: Lightning is iterating over the old one.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = iter(sorted((c for c in callbacks if isinstance(c, Member)), key=lambda c: c.order))
    trainer.callbacks = [next(ours) if isinstance(c, Member) else c for c in callbacks]  # type: ignore[attr-defined]


def publish(
    trainer: Trainer, pl_module: LightningModule, step: int, values: Mapping[str, float], summary: Iterable[str]
) -> None:
    """Send values to every logger in one call, and the summary keys to where ModelCheckpoint and EarlyStopping look.

    In ``validate`` and ``test`` Lightning does the logging, so that the values are in what those print and return.
    """
    if trainer.state.fn != "fit":
        several_ranks = trainer.world_size > 1
        for key, value in values.items():
            pl_module.log(key, value, on_step=False, on_epoch=True, sync_dist=several_ranks)
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    for key in summary:
        # Without the size, Lightning looks for it in the batch, which a step with a `dataloader_iter` does not have.
        pl_module.log(key, values[key], logger=False, on_step=True, on_epoch=False, batch_size=1)


def _refuse_sharded(callback: Member, trainer: Trainer) -> None:
    # By name: `lightning` and `pytorch_lightning` each have their own classes. DeepSpeedStrategy is a DDPStrategy.
    names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
    served = {"SingleDeviceStrategy", "DDPStrategy"} | ({"ModelParallelStrategy"} if callback.serves_shards else set())
    if names.isdisjoint(served) or "DeepSpeedStrategy" in names:
        where = (
            "a single device, DDP, FSDP2 and tensor parallelism"
            if callback.serves_shards
            else "a single device and DDP"
        )
        raise SetupError(
            f"{type(callback).__name__} serves {where}, but not yet {type(trainer.strategy).__name__}. Use another "
            "strategy, or leave the callback out."
        )
