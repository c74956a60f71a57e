"""Fine-tuning in stages: first the head, then more, at last everything."""

from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._facts import has_scaler
from lit_callbacks._learning_rate import lower_learning_rate
from lit_callbacks._member import Member
from lit_callbacks._shards import is_sharded, names_with_state, settle


class GradualUnfreezing(Member):
    """Train only some parameters at first, and everything in the end (ULMFiT, Howard and Ruder 2018).

    In stage ``i`` the parameters are trained whose names match one of ``stages[0]`` to ``stages[i]``; after the last
    one all are that needed a gradient before. What is frozen has no gradient, so that the optimizer leaves it alone,
    decay included, and modules of which everything is frozen are in ``eval()``: their dropout is off and their running
    statistics stay.

    The stage is that of the epoch, so a resumed run is in the right one. Learning rates are those of optimizer and
    schedule times ``lr_scales``: with the defaults and ``lr=1e-4``, five epochs of the head at 1e-4, then all at 1e-5.
    All parameters must be in the optimizer from the beginning; frozen ones cost it nothing, as it makes their state
    with their first gradient.

    Args:
        stages: Globs over the names in ``module.named_parameters()``, one per stage; ``|`` separates several. By
            default the head: what has ``classifier``, ``head`` or ``score`` in its name.
        epochs: How long each of these stages is; by default 5 each.
        lr_scales: A factor per stage, and one for after the last; by default 1, and 0.1 at last.

    Raises:
        ValueError: If an argument is out of range, or their lengths do not fit together.
        SetupError: At the start of fit, if a glob matches no parameter, if a parameter is in no optimizer, under FSDP1
            and DeepSpeed, or under DDP without ``find_unused_parameters=True``: it would wait for the gradients
            of frozen parameters.

    State: none.

    Cost: a pass over the parameters per epoch.

    Example:
        >>> GradualUnfreezing(stages=["*classifier*", "*.layer.11.*"], epochs=[1, 1]).stage_of(epoch=1)
        1
    """

    order = 2
    serves_shards = True
    serves_flat_shards = False

    def __init__(
        self,
        stages: list[str] | None = None,
        epochs: list[int] | None = None,
        lr_scales: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.epochs, self.lr_scales = stages, epochs, lr_scales
        self._globs = ["*classifier*|*head*|*score*"] if stages is None else stages
        n = len(self._globs)
        lengths = [5] * n if epochs is None else epochs
        self._scales = [*[1.0] * n, 0.1] if lr_scales is None else lr_scales
        if not n or not all(self._globs):
            raise ValueError(f"stages must be globs, got {stages!r}")
        if len(lengths) != n or any(length < 1 for length in lengths):
            raise ValueError(f"epochs must be {n} numbers of at least 1, got {epochs!r}")
        if len(self._scales) != n + 1 or any(scale <= 0 for scale in self._scales):
            raise ValueError(f"lr_scales must be {n + 1} numbers above 0, got {lr_scales!r}")
        self._ends = list(accumulate(lengths))
        self.events = EventLog()
        self._trainable: list[str] = []
        self._evaluated: list[str] = []
        self._stage = -1
        self._hooks: list[Any] = []

    def stage_of(self, epoch: int) -> int:
        """Which stage an epoch is in, counted from 0."""
        return sum(epoch >= end for end in self._ends)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies and globs that do not fit; remember what is trained in the end."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        settings = getattr(trainer.strategy, "_ddp_kwargs", None)  # where Lightning keeps what it hands to DDP
        if settings is not None and (not settings.get("find_unused_parameters") or settings.get("static_graph")):
            raise SetupError(
                "GradualUnfreezing under DDP needs strategy='ddp_find_unused_parameters_true' and no static graph: DDP "
                "would wait for the gradients of frozen parameters."
            )
        self.events, self._stage, self._evaluated = EventLog(run_folder(trainer)), -1, []
        self._trainable = [name for name, p in pl_module.named_parameters() if p.requires_grad]
        for i, glob in enumerate(self._globs):
            if not any(_matches(name, glob) for name in self._trainable):
                names = ", ".join(self._trainable[-3:])
                raise SetupError(f"stages[{i}] = {glob!r} matches no parameter; names are such as {names}.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Torch asks a checkpoint in parts for the states of all that is trained, and it has none of what was not."""
        if not is_sharded(pl_module):
            return
        strategy: Any = trainer.strategy
        load, own = strategy.load_checkpoint, vars(strategy).get("load_checkpoint")

        def put_back() -> None:
            vars(strategy).pop("load_checkpoint")
            if own is not None:
                strategy.load_checkpoint = own

        def load_what_was_trained(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._unhook()
            if Path(path).is_dir():
                saved = names_with_state(Path(path))
                for name, parameter in pl_module.named_parameters():
                    parameter.requires_grad_(name in self._trainable and name in saved)
            return load(path, *args, **kwargs)

        strategy.load_checkpoint = load_what_was_trained
        self._hooks.append(SimpleNamespace(remove=put_back))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stage in which this fit begins, which may be in the middle of one."""
        self._unhook()
        settle(pl_module)  # after a sanity check, FSDP2 shows whole parameters, which no optimizer has
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        missing = [n for n, p in pl_module.named_parameters() if n in set(self._trainable) and id(p) not in held]
        if missing:
            raise SetupError(
                f"{missing[0]} and {len(missing) - 1} other parameters are in no optimizer: put all into one."
            )
        self._enter(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The stage of this epoch."""
        self._enter(trainer, pl_module)

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = self.stage_of(trainer.current_epoch)
        globs = self._globs[: stage + 1] if stage < len(self._globs) else ["*"]
        settle(pl_module)
        wanted = {name for name in self._trainable if any(_matches(name, glob) for glob in globs)}
        for name, parameter in pl_module.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(name in wanted)
                if name not in wanted:
                    parameter.grad = None
        self._set_modes(pl_module)
        if stage != self._stage:
            self._stage = stage
            text = f"{len(wanted)} of {len(self._trainable)} parameters are trained"
            say(f"epoch {trainer.current_epoch}: {text}, at {self._scales[stage]:g} times the learning rate.")
            self.events.write(step=trainer.global_step, event="unfreeze", stage=stage, parameters=len(wanted))

    def _set_modes(self, pl_module: LightningModule) -> None:
        """Frozen modules in eval mode; those that were put there by this callback and are frozen no more, back."""
        modules = dict(pl_module.named_modules())
        for name in self._evaluated:
            modules[name].train()
        frozen = {n: m for n, m in modules.items() if _is_frozen(m) and m.training}
        for module in frozen.values():
            module.eval()
        self._evaluated = list(frozen)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The stage's learning rate, for this step."""
        self._hooks += lower_learning_rate(optimizer, self._scales[self._stage], has_scaler(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The step is over."""
        self._unhook()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        super().on_exception(trainer, pl_module, exception)
        self._unhook()
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        settle(pl_module)
        for name, parameter in pl_module.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)
        self._set_modes(pl_module)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _matches(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs.split("|"))
