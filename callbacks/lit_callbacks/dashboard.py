"""What does a run look like to those who watch it from afar?"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks._cadence import Cadence
from lit_callbacks._deepspeed import step_follows
from lit_callbacks._events import run_folder
from lit_callbacks._facts import facts_of
from lit_callbacks._heard import Heard
from lit_callbacks._heat_maps import draw, heat_maps
from lit_callbacks._listeners import listen, stop_listening
from lit_callbacks._member import Member
from lit_callbacks._pictures import show_picture
from lit_callbacks._redaction import redacted
from lit_callbacks._step_losses import StepLosses
from lit_callbacks._step_skipper import DivergenceError
from lit_callbacks._verdict import show_verdict
from lit_callbacks._wandb_runs import Alerts, hide, introduce, is_of_a_part, keep_checkpoints, log_events
from lit_callbacks.health import Diagnosis, diagnose

_SHARE = 0.002  # of the run's time, for pictures


class Dashboard(Member):
    """Make W&B and TensorBoard show what the other callbacks of this package have found, with a verdict at the end.

    It measures nothing but the loss: it hears what the others log and write down. Of the loggers that are there,

    - a *W&B* run gets summaries that are right (the lowest ``val/loss``, the highest counters of recovery, and the best
      of what ModelCheckpoint and EarlyStopping monitor), tags for strategy and precision, the events as a table, alerts
      (loss spikes, rollbacks, collapsing attention, gradients, a run that hangs, fails or is stopped), heat maps, and
      the columns ``health/verdict``, ``health/culprit``, ``health/first_warning_step``, ``health/rollbacks`` and
      ``health/steps_lost``; what is logged of each layer or group (``grad_norm/<group>``) is in the run, but W&B
      draws no chart of it unless asked to;
    - *TensorBoard* gets the heat maps, and the verdict as text;
    - where a logger cannot show pictures, or there is none, they are ``figures/heat_maps_*.png`` in the run folder.

    The heat maps are ``heat_maps/attention_entropy`` (layer x head, of :class:`AttentionEntropyMonitor`),
    ``heat_maps/grad_norm`` (layer x time, of :class:`GradientNormLogger`) and ``heat_maps/dead_neurons`` (layer x time,
    of :class:`DeadNeuronDetector`). The verdict is that of :func:`lit_callbacks.health.diagnose`; with several devices
    the training loss that it judges is the mean over them. It is called as the module logs it, else ``train/loss``.

    Without a network, W&B keeps everything in the run folder for ``wandb sync``, alerts too. A logger that raises costs
    what it was to show and one warning. :func:`~lit_callbacks.shield` also guards against one that blocks while it is
    given metrics, pictures or tables; alerts, summaries and tags go to the W&B run itself, without that guard.

    Logs: no metrics.

    Args:
        every_n_steps: Optimizer steps between heat maps, and between tables if there are new events.
        alert_every_minutes: Least time between two alerts of a kind.
        checkpoints: Also keep the last and the best checkpoint as a W&B artifact when fit ends.

    Raises:
        ValueError: If an argument is out of range.

    State: for the heat maps and the verdict, of each key the last 200 points and at most 128 before them, of the
    training loss those of the last 1000 steps and at most 1000 before them, and the last 200 events. With several
    devices a checkpoint may lack the losses of up to nine steps before it.

    Cost: on rank zero one read by the host in 500 steps; with several devices, one collective of 20 numbers in ten.
    Heat maps take about 0.2 s each and are left out while they have taken more than 0.2 % of the run's time.

    Example:
        >>> Dashboard(alert_every_minutes=30).every_n_steps
        1000
    """

    order = 4
    serves_shards = True
    serves_zero = True

    def __init__(self, every_n_steps: int = 1000, alert_every_minutes: float = 5.0, checkpoints: bool = False) -> None:
        self._cadence = Cadence(every_n_steps)
        if alert_every_minutes < 0:
            raise ValueError(f"alert_every_minutes must be at least 0, got {alert_every_minutes}")
        self.every_n_steps = every_n_steps
        self.alert_every_minutes = alert_every_minutes
        self.checkpoints = checkpoints
        self.diagnosis: Diagnosis | None = None
        """The verdict, once fit has ended; on rank zero."""
        self._heard = Heard()
        self._leave()

    def _leave(self) -> None:
        stop_listening(self)
        self._on = False
        self._trainer: Trainer | None = None
        self._folder, self._losses = Path(), StepLosses()
        self._warned = False
        self._alerts = Alerts(self.alert_every_minutes)
        self._hidden: set[str] = set()
        self._shown_at, self._new_events, self._named = -1, False, False
        self._spent = self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to listen, on rank zero; the others help it to the mean loss."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            folder = run_folder(trainer)
            self._leave()
            self._on = not trainer.fast_dev_run  # type: ignore[attr-defined]
            if self._on and trainer.is_global_zero:
                if trainer.global_step == 0:  # a checkpoint is loaded later
                    self._heard = Heard()
                self._trainer, self._folder = trainer, folder
                listen(self, trainer, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what lies ahead of where this fit begins, and introduce it to W&B."""
        if self._trainer is None:
            return
        step = trainer.global_step
        self._cadence.start(step + 1)  # the first heat map is not of one step
        self._heard.cut(step)
        self._started = time.monotonic()
        self._attempt(introduce, trainer)

    def hear_values(self, step: int, values: Mapping[str, float], logged: bool) -> None:
        """Keep those that heat maps and verdict are made of, and let W&B draw no chart of each layer."""
        self._heard.keep(step, values)
        new = {key for key in values if is_of_a_part(key)} - self._hidden if logged else set()
        if new and self._trainer is not None:
            self._hidden |= new
            self._attempt(hide, self._trainer, sorted(new))

    def hear_event(self, event: Mapping[str, Any]) -> None:
        """Keep it, and raise an alert."""
        kept = self._heard.keep_event(event)
        self._new_events = True
        if (trainer := self._trainer) is not None:
            self._attempt(self._alerts.raise_for, trainer, kept)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the shared facts see the loss."""
        if self._on:  # what automatic optimization shows is made for this step and nobody writes to it
            own = loss if pl_module.automatic_optimization else loss.detach().clone()
            facts_of(trainer).record_loss(self, trainer.global_step, own)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the loss of every step on the device; of ten steps at once, the mean over micro-batches and ranks."""
        if self._on and optimizer is trainer.optimizers[0] and step_follows(trainer):
            step = trainer.global_step
            if self._losses.keep(trainer, step, left_out=not self._heard.was_made(step)):
                self._gather(trainer, name=not self._named)

    def _gather(self, trainer: Trainer, name: bool = False, alone: bool = False) -> None:
        """Mean losses from all ranks, which must be here together unless there is but one, and their name."""
        if not self._on or (alone and trainer.world_size > 1):
            return
        means = self._losses.means(trainer)
        logged = [*trainer.logged_metrics] if name else []  # on all ranks, as reading them may reduce them
        self._named |= name
        if self._trainer is not None:
            self._heard.keep_losses(means, logged)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the heat maps and the events, if it is time."""
        if self._trainer is not None and self._cadence.due(trainer.global_step):
            if self._spent <= _SHARE * (time.monotonic() - self._started):
                self._attempt(self._show_heat_maps)
            self._attempt(self._show_events)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation loss."""
        metrics = trainer.callback_metrics  # on all ranks, as reading them may reduce them
        if self._trainer is not None and not trainer.sanity_checking:
            losses = {key: float(metrics[key]) for key in metrics if key.startswith("val") and key.endswith("loss")}
            self._heard.keep(trainer.global_step - 1, losses)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last losses, before a checkpoint is written."""
        self._gather(trainer, name=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show everything, with the verdict."""
        self._conclude()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show everything there is: a run that failed is the one to look at."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Exception) and self._trainer is not None:
            title = "Run stopped" if isinstance(exception, DivergenceError) else "Run failed"
            text = f"step {trainer.global_step}: {type(exception).__name__}: {exception}"
            self._attempt(lambda: self._alerts.send(trainer, title, redacted(text)))
        self._attempt(self._gather, trainer, True, True)
        self._conclude()
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hear nothing any more."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def _show_heat_maps(self) -> None:
        assert self._trainer is not None
        begin, step = time.monotonic(), max(self._trainer.global_step - 1, 0)
        if step != self._shown_at:
            self._shown_at = step
            for shown in heat_maps(self._heard.series(), self._heard.last):
                show_picture(self._trainer, step, shown.key, draw(shown), self._folder)
        self._spent += time.monotonic() - begin

    def _show_events(self) -> None:
        assert self._trainer is not None
        if self._new_events:
            self._new_events = False
            log_events(self._trainer, max(self._trainer.global_step - 1, 0), self._heard.events)

    def _conclude(self) -> None:
        if self._trainer is not None:
            for part in (self._show_heat_maps, self._show_events, self._show_verdict):
                self._attempt(part)
            if self.checkpoints:
                self._attempt(keep_checkpoints, self._trainer)

    def _show_verdict(self) -> None:
        assert self._trainer is not None
        self.diagnosis = found = diagnose(self._heard.series(), self._heard.events)
        counters = {name: self._heard.last.get(f"loss_spike/{name}", 0.0) for name in ("rollbacks", "steps_lost")}
        show_verdict(self._trainer, found, counters)

    def _attempt(self, act: Callable[..., Any], *args: Any) -> None:
        """What a logger does must not end training."""
        try:
            act(*args)
        except Exception as error:
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"Dashboard could not show everything: {type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """What has been heard."""
        if self._trainer is not None:
            self._gather(self._trainer, alone=True)
        return self._heard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._heard.load_state_dict(state_dict)
