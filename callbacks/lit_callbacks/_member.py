"""What observers and actors share: their order, what they refuse, the shared facts, and where their numbers go."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_callbacks import _deepspeed
from lit_callbacks._errors import SetupError
from lit_callbacks._events import begin, begun
from lit_callbacks._facts import forget
from lit_callbacks._listeners import tell_values


class Member(Callback):
    """A callback of this package. Constructor arguments are kept as attributes of the same name."""

    order: int
    """Position among our callbacks in every hook: -1 faults, 0 observers, 1 clipper and autopsy, 2 guards and
    recovery, 3 checkpoints, 4 the dashboard, which hears them all."""

    serves_shards: ClassVar[bool] = False
    """Whether it works where a rank holds a part only of each parameter, as under FSDP."""

    serves_flat_shards: ClassVar[bool] = True
    """If it does, whether also under FSDP1, where pieces are flat and names other ones."""

    serves_zero: ClassVar[bool] = False
    """Whether it works under DeepSpeed, which keeps gradients to itself, and clips and steps in its engine."""

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
        begin(trainer)
        arrange(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the shared facts."""
        begun(trainer)
        forget(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the shared facts: Lightning does not call ``teardown`` after an exception."""
        if trainer.global_step:  # else it may be the checkpoint that cannot be gone on from
            begun(trainer)
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
    begun(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    tell_values(trainer, step, values, logged=True)
    for key in summary:
        # Without the size, Lightning looks for it in the batch, which a step with a `dataloader_iter` does not have.
        pl_module.log(key, values[key], logger=False, on_step=True, on_epoch=False, batch_size=1)


def refuse_unknown_engine(callback: Member, trainer: Trainer) -> None:
    """Refuse a DeepSpeed that keeps things elsewhere than the callback looks for them; from the start of fit on."""
    if "DeepSpeedStrategy" not in _strategy_names(trainer):
        return
    engine = _deepspeed.engine_of(trainer)
    absent = ["a ZeRO optimizer"] if engine is None else _deepspeed.missing(engine)
    if absent:
        raise SetupError(
            f"{type(callback).__name__} needs ZeRO stage 1, 2 or 3 as in DeepSpeed 0.19, and does not find "
            f"{', '.join(absent)}. Install that version, or leave the callback out."
        )


def _refuse_sharded(callback: Member, trainer: Trainer) -> None:
    # By name: `lightning` and `pytorch_lightning` each have their own classes. DeepSpeedStrategy is a DDPStrategy.
    names = _strategy_names(trainer)
    served = ["a single device", "DDP"]
    if callback.serves_shards:
        served.append("FSDP" if callback.serves_flat_shards else "FSDP2")
    served += ["DeepSpeed"] if callback.serves_zero else []
    if "DeepSpeedStrategy" in names:
        is_served = callback.serves_zero
    else:
        is_served = any(not names.isdisjoint(_STRATEGIES[what]) for what in served)
    if not is_served:
        raise SetupError(
            f"{type(callback).__name__} serves {', '.join(served[:-1])} and {served[-1]}, but not yet "
            f"{type(trainer.strategy).__name__}. Use another strategy, or leave the callback out."
        )
    if "FSDPStrategy" in names:
        sharding = trainer.strategy.sharding_strategy.name  # type: ignore[attr-defined]
        if not trainer.strategy.kwargs.get("use_orig_params"):  # type: ignore[attr-defined]
            raise SetupError(
                f"{type(callback).__name__} needs parameters that it can tell apart. Set use_orig_params=True for "
                "FSDPStrategy, which is Lightning's default, or leave the callback out."
            )
        if sharding not in ("FULL_SHARD", "SHARD_GRAD_OP"):
            raise SetupError(
                f"{type(callback).__name__} serves the sharding strategies FULL_SHARD and SHARD_GRAD_OP of "
                f"FSDPStrategy, not {sharding}. Use one of them, or leave the callback out."
            )


_STRATEGIES: dict[str, set[str]] = {
    "a single device": {"SingleDeviceStrategy"},
    "DDP": {"DDPStrategy"},
    "FSDP": {"ModelParallelStrategy", "FSDPStrategy"},
    "FSDP2": {"ModelParallelStrategy"},
    "DeepSpeed": set(),  # a DDPStrategy to Python
}


def _strategy_names(trainer: Trainer) -> set[str]:
    return {cls.__name__ for cls in type(trainer.strategy).__mro__}
