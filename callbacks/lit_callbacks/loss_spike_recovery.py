"""What happens when a step is bad? It is not made; and if the damage is done already, it is undone."""

import math
from functools import partial
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lit_callbacks import _spike_report as report
from lit_callbacks._data_jump import data_place, jump, may_jump
from lit_callbacks._deepspeed import step_follows
from lit_callbacks._errors import SetupError
from lit_callbacks._events import run_folder
from lit_callbacks._facts import facts_of, has_scaler
from lit_callbacks._ladder import NOT_FINITE, Decision, Ladder
from lit_callbacks._learning_rate import lower_learning_rate
from lit_callbacks._rewinder import Rewinder
from lit_callbacks._step_skipper import DivergenceError, StepSkipper
from lit_callbacks.protocols import CanExclude
from lit_callbacks.rules import RobustRule, SpikeRule, Verdict

_LONG_SEARCH = 3  # steps


class LossSpikeRecovery(StepSkipper):
    r"""Keep a run as good as if its bad steps had never been: skip, roll back, pass over data, or stop in time.

    Before every optimizer step all ranks look at the same two numbers, the mean loss and the norm of the gradient
    before clipping, and a rule compares them with those of the last steps. What can be done about a bad step, mildest
    first:

    1. *Skip* it, on all ranks. Weights, optimizer, buffers, metrics, the means of what was logged and random number
       generators stay as they were. Bad batches end here. Samples whose loss is not finite are excluded, where the data
       module can do that.
    2. *Roll back*. After three anomalies a batch from before shows whether it is the weights: they are damaged if it
       costs more now than it did then. They go back to a snapshot that was followed by clean steps; the data goes on,
       so what was seen in between is not seen again. Flipped bits, learning-rate faults and broken optimizer states end
       here. A repeated rollback passes over as much data again; the third goes to an older snapshot; from the fourth on
       the learning rate is halved, and comes back.
    3. *Accept*. If the weights are healthy, or restored ones find the very next batch as bad, the data has changed for
       good, and its level is the new normal.
    4. *Stop*, with :class:`DivergenceError` and a checkpoint of the oldest snapshot, when rollbacks do not help.

    A loss that rises slowly, or is far too low, is no reason to skip, but one to look at the weights in the same way.
    ``trainer.global_step`` never goes back, and the learning rate stays on its schedule. Every action is a line in
    ``events.jsonl`` of the run folder, a line on the console and, with :class:`Dashboard`, an alert in W&B.

    An infinite *gradient* under a GradScaler is how the scaler searches for its factor, and is left to it. This
    callback does all that :class:`NonFiniteGuard` does; leave that one out.

    Logs, when they change and every 50 steps:
        loss_spike/score: how far the loss is from normal, in the rule's units. Also in ``trainer.callback_metrics``.
        loss_spike/skipped_steps: steps skipped so far. Also in ``trainer.callback_metrics``.
        loss_spike/rollbacks: rollbacks so far. Also in ``trainer.callback_metrics``.
        loss_spike/steps_lost: steps undone by rollbacks so far. Also in ``trainer.callback_metrics``.
        loss_spike/nonfinite: steps with a non-finite loss or gradient so far. Also in ``trainer.callback_metrics``.
        loss_spike/accepted: new levels accepted so far. Also in ``trainer.callback_metrics``.
        loss_spike/lr_factor: 1 unless recovery has lowered the learning rate. Also in ``trainer.callback_metrics``.

    Args:
        rule: Judges each step, from :mod:`lit_callbacks.rules`; by default ``RobustRule()``.
        patience: Anomalies, less two for each normal step, after which skipping is not enough; at least 3, as many as
            it takes to look at the weights.
        snapshot_every_n_steps: Optimizer steps between snapshots.
        keep_snapshots: Snapshots to keep; fewer, or on disk, where host memory has no room for them.
        prove_steps: Clean steps that must follow a snapshot before it is trusted.
        max_rollbacks: Rollbacks within ``budget_steps``, after which the run stops.
        budget_steps: Optimizer steps after which a rollback no longer counts.
        cooldown_steps: Optimizer steps after which a lowered learning rate is doubled, until it is back.

    Raises:
        ValueError: If an argument is out of range, or the snapshots do not reach back as far as they must be proven.
        SetupError: At setup in manual optimization, under DeepSpeed with fp16, or beside another of its kind or a
            ``NonFiniteGuard``; at fit start if the optimizer moves without gradients, cannot be tried on a toy
            parameter, or is fused while a GradScaler is in use.
        DivergenceError: When rollbacks do not help, or there is nothing to go back to.

    State: the rule's memory, the open episode, the budget, the counters. Snapshots are not: a resumed run begins with
    the one of its checkpoint.

    Cost: the gradient norm and one read by the host on every step; a copy of trainable parameters and optimizer state
    every ``snapshot_every_n_steps``, on a GPU into page-locked memory behind the step; the batches of a window are kept
    until the next, and one for each snapshot. Frozen parameters are only copied if one of the first three snapshots
    finds that they move, as a teacher's do.

    Example:
        >>> LossSpikeRecovery(patience=6).patience
        6
    """

    serves_shards = True
    serves_zero = True

    def __init__(
        self,
        rule: SpikeRule | None = None,
        patience: int = 12,
        snapshot_every_n_steps: int = 25,
        keep_snapshots: int = 5,
        prove_steps: int = 10,
        max_rollbacks: int = 5,
        budget_steps: int = 500,
        cooldown_steps: int = 100,
    ) -> None:
        for name, value, least in (
            ("patience", patience, 3),
            ("snapshot_every_n_steps", snapshot_every_n_steps, 1),
            ("keep_snapshots", keep_snapshots, 2),
            ("prove_steps", prove_steps, 0),
            ("max_rollbacks", max_rollbacks, 1),
            ("budget_steps", budget_steps, 1),
            ("cooldown_steps", cooldown_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        reach = (keep_snapshots - 1) * snapshot_every_n_steps
        if prove_steps > reach:
            raise ValueError(
                f"prove_steps must be at most (keep_snapshots - 1) * snapshot_every_n_steps = {reach}, as far back as "
                f"there is always a snapshot, got {prove_steps}"
            )
        super().__init__()
        self.rule, self.patience, self.prove_steps = rule, patience, prove_steps
        self.snapshot_every_n_steps, self.keep_snapshots = snapshot_every_n_steps, keep_snapshots
        self.max_rollbacks, self.budget_steps, self.cooldown_steps = max_rollbacks, budget_steps, cooldown_steps
        self._rewinder: Rewinder | None = None
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet: a new fit may be of another model. What a checkpoint knows is loaded after that."""
        rule = RobustRule() if self.rule is None else self.rule
        rule.restart()
        limits = self.max_rollbacks, self.budget_steps, self.cooldown_steps
        self._ladder = Ladder(rule, self.patience, self.prove_steps, *limits)
        self._report = report.SpikeReport()
        self._jump, self._searches = 0, 0
        self._hooks: list[Any] = []
        self._stop: Decision | None = None
        self._restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rewinder": None, "_hooks": []}

    @property
    def rewinder(self) -> Rewinder:
        """The snapshots; during fit only."""
        assert self._rewinder is not None
        return self._rewinder

    def expect_shift(self) -> None:
        """Announce that the loss is about to change its level, because the data does. To be called on all ranks.

        The next steps are not judged, but for whether they are finite, until the rule has seen enough of them.
        """
        self._ladder.expect_shift()
        if self._rewinder is not None:
            self._rewinder.forget_batches()

    def has_open_anomaly(self) -> bool:
        """Whether an episode is open."""
        return not self._ladder.quiet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse company."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [type(c).__name__ for c in callbacks if isinstance(c, StepSkipper) and c is not self]
        if others:
            raise SetupError(
                f"LossSpikeRecovery decides alone which steps are made, but there is a {others[0]} too. It also does "
                "what NonFiniteGuard does: leave the other one out."
            )
        self._begin()
        self._rewinder = Rewinder(self.snapshot_every_n_steps, self.keep_snapshots, run_folder(trainer))

    def keeps_batches(self, trainer: Trainer) -> bool:
        """For a look at the weights."""
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module now that a checkpoint has been loaded."""
        super().on_train_start(trainer, pl_module)
        self.rewinder.start(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take a snapshot, if it is time and no episode is open."""
        first = batch_idx % trainer.accumulate_grad_batches == 0
        # A run that was resumed in the middle of an episode has nothing but its checkpoint to go back to.
        quiet = self._ladder.quiet or not self.rewinder.has_any
        if first and quiet and self.rewinder.due(trainer, pl_module):
            self.rewinder.take(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if first:
            self.rewinder.batch_follows(self.window)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step; make it, or do something about it."""
        if not step_follows(trainer):
            return
        reading = facts_of(trainer).reading(trainer, optimizer)
        searching = has_scaler(trainer) and reading.finite and not math.isfinite(reading.grad_norm)
        self._searches = self._searches + 1 if searching else 0
        # A scaler finds its factor in a few steps, unless it is the weights.
        if searching and self._searches % _LONG_SEARCH == 0:
            searching = self.rewinder.are_weights_healthy(trainer, pl_module, math.inf, 0) is not False
        if reading.loss is None or searching or self._stop is not None:
            return
        step = trainer.global_step
        if self.rewinder.is_finite():
            ask = partial(self.rewinder.are_weights_healthy, trainer, pl_module)
            decision = self._ladder.decide(step, reading.loss, reading.grad_norm, ask)
        else:
            verdict = Verdict(anomalous=True, score=math.inf, reason="weights or optimizer state not finite")
            decision = self._ladder.roll_back(step, verdict, damaged=True)
        counts = self._report.counts
        counts["steps"] += 1
        if decision.action in ("update", "accept"):
            self.rewinder.step_follows(trainer)
            self._hooks += lower_learning_rate(optimizer, self._ladder.state.lr_factor, has_scaler(trainer))
        if decision.action == "update":
            if decision.healthy is not None:
                self.events.write(step=step, event="look", rule=decision.verdict.reason, weights_healthy=True)
            self._report.log(trainer, pl_module, self._ladder.state.lr_factor, decision.verdict.score)
            return
        event = self.describe(trainer, pl_module, reading)
        counts["nonfinite"] += decision.verdict.reason == NOT_FINITE
        if decision.action == "accept":
            counts["accepted"] += 1
            self.rewinder.forget_batches()
            self._say(trainer, pl_module, decision, event)
            return
        counts["skipped_steps"] += 1
        self.skip(trainer, optimizer, reading)
        if decision.action == "skip":
            self._exclude(trainer, decision, event)
            self._say(trainer, pl_module, decision, event)
            self._report.advise(step)
        else:
            self._go_back(trainer, pl_module, decision, event)
            self.keep_settings(optimizer)

    def _exclude(self, trainer: Trainer, decision: Decision, event: dict[str, Any]) -> None:
        """Never again draw samples whose loss is not finite on healthy weights."""
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if decision.healthy and event["first_bad_rank"] is not None and isinstance(data, CanExclude):
            data.exclude(event["sample_ids"] or [])

    def _go_back(self, trainer: Trainer, pl_module: LightningModule, decision: Decision, event: dict[str, Any]) -> None:
        place = self.rewinder.go_back(trainer, pl_module, decision.before, decision.further)
        if has_scaler(trainer):  # the scaler counts this step after us
            self._scaler = trainer.precision_plugin.state_dict()
        if place is not None:
            self._report.counts["steps_lost"] += trainer.global_step - place.step
            event |= {"to_step": place.step, "rollback": decision.number}
        if decision.action == "stop" or place is None:
            self._stop, self._restored = decision, place is not None
        else:
            self._report.counts["rollbacks"] += 1
            self._jump = decision.jump * (data_place(trainer) - place.data)
        self._say(trainer, pl_module, decision, event)

    def _say(self, trainer: Trainer, pl_module: LightningModule, decision: Decision, event: dict[str, Any]) -> None:
        state = self._ladder.state
        action = decision.action if self._stop is None else "stop"
        self._report.tell(trainer, pl_module, self.events, action, decision, event, state)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what has to wait until the step is over: pass over data, or stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._remove_hooks()
        if self._stop is not None:
            self._end(trainer, self._stop.verdict.reason)
        if self._jump and may_jump(trainer, batch_idx):
            n, self._jump = self._jump, 0
            self.events.write(step=trainer.global_step, event="jump", passed_over=jump(trainer, n))

    def _end(self, trainer: Trainer, reason: str) -> NoReturn:
        if not self._restored:
            raise DivergenceError(report.farewell(trainer, reason, None, self.rewinder.culprit))
        self._ladder.state.rollbacks = []  # whoever goes on from here has changed something
        path = run_folder(trainer) / "last_good.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            raise DivergenceError(
                f"Stopped at step {trainer.global_step}: {reason}, and going back does not help. The weights in memory "
                f"are good, but could not be saved: {error}. Go on from an earlier checkpoint."
            ) from error
        raise DivergenceError(report.farewell(trainer, reason, path, None))

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the snapshots."""
        super().teardown(trainer, pl_module, stage)
        self._rewinder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the snapshots."""
        super().on_exception(trainer, pl_module, exception)
        self._remove_hooks()
        self._rewinder = None

    def state_dict(self) -> dict[str, Any]:
        """The rule's memory, the open episode, the budget and the counters."""
        return {**self._ladder.state_dict(), "report": self._report.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Decide as the callback that was saved."""
        self._ladder.load_state_dict(state_dict)
        self._report.load_state_dict(state_dict["report"])
