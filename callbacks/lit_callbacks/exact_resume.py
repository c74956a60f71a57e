"""Does a resumed run do what the undisturbed one would have done? To the last bit."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_callbacks import _ranks
from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._loader_position import (
    finish_epoch,
    knows_its_position,
    loaders,
    pass_over,
    restore_parts,
    set_epoch,
)
from lit_callbacks._member import Member
from lit_callbacks._resume_state import (
    add_logged,
    capture,
    changes,
    epoch_means,
    fingerprint,
    finish_metrics,
    randomness,
    restore,
    set_randomness,
)
from lit_callbacks.protocols import HasPosition

KEY = "exact_resume"
"""Where this callback's part of a checkpoint is."""

_FALSE_WARNING = "You're resuming from a checkpoint that ended before the epoch ended"


class ExactResume(Member):
    """Save what a Lightning checkpoint leaves out, and put it back at the right moment.

    Lightning 2.6.6 saves no random number generator, not the place in a plain ``DataLoader``, not the metrics under
    way, and not the sums behind logged epoch means. A run that goes on from its checkpoint is another run. With this
    callback it is, on a CPU, bit for bit the one that was not interrupted: weights, optimizer, sample order, logged
    values.

    - Random numbers of torch, the device, Python and numpy, and the generators of loaders and samplers, of each rank.
      In the middle of an epoch they are put back after the loader's iterator exists, at its start before that.
    - The place in a loader without ``state_dict``: the epoch's order is drawn again, and what was seen is passed over
      by loading it. Samplers are told the epoch before the iterator is made (Lightning issue 21938).
    - A loader with ``state_dict``, such as torchdata's ``StatefulDataLoader``, goes on from it, also when
      ``configure_optimizers`` reads ``estimated_stepping_batches`` (issue 20550) and at an epoch's end. Random numbers
      that are drawn in its workers begin anew in that epoch: it does not save them.
    - Metrics of the module, the sums of logged epoch means, ``callback_metrics``, the step that the loggers count, and
      the row of the last step, which Lightning logs after the checkpoint of that step.

    A checkpoint remembers the shapes of the parameters, world size, accumulation, and what the data module's
    ``fingerprint()`` says; a run that differs is refused. Another world size is allowed where the data module has a
    ``position()``; the random numbers are other ones then, which is said.

    It needs checkpoints saved between two steps, as :class:`VerifiedCheckpoint` saves them. What the module does in its
    own ``on_train_batch_end``, which Lightning calls after the checkpoint, is not done again.

    Args:
        allow_changes: Go on although the fingerprint differs.

    Raises:
        SetupError: When a checkpoint is loaded for fit, if the fingerprint differs; it names each value.

    State: in ``checkpoint["exact_resume"]``, per rank; plain data.

    Cost: some 30 KiB per rank in a checkpoint; on a step, a few attributes (1 to 2 µs); a resume in the middle of an
    epoch loads the batches before it, unless the loader knows its place.

    Example:
        >>> ExactResume().allow_changes
        False
    """

    serves_shards = True
    serves_zero = True

    order = 3

    def __init__(self, allow_changes: bool = False) -> None:
        super().__init__()
        self.allow_changes = allow_changes
        self.events = EventLog()
        self._begin()

    def _begin(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._stage: Literal["", "epoch_start", "mid_epoch", "epoch_end"] = ""
        self._epoch_start: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._logged_before: dict[str, Any] = {}
        self._metrics_before: dict[str, str] = {}
        self._next_logged_step: int | None = None
        self._set_logged_step: int | None = None
        self._in_batch_end = False
        self._filter: Any = None
        self._fit_started = False

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._begin()
        self.events = EventLog(run_folder(trainer))
        load_states = trainer.fit_loop._load_combined_loader_states
        prepare = functools.partial(self._prepare_iterator, trainer, load_states)
        trainer.fit_loop._load_combined_loader_states = prepare  # type: ignore[method-assign]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this rank's part of a checkpoint, if it is one of the same run."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get(KEY)
        if saved is None:
            say("The checkpoint is one without ExactResume: random numbers, place in the data and metrics begin anew.")
            return
        self._refuse_changes(trainer, pl_module, saved["fingerprint"])
        same_ranks = len(saved["ranks"]) == trainer.world_size
        if not same_ranks:
            text = f"The checkpoint is of {len(saved['ranks'])} ranks, this run has {trainer.world_size}"
            say(f"{text}: it goes on with the same samples, but with other random numbers.")
            self.events.write(step=checkpoint["global_step"], event="resume", other_ranks=len(saved["ranks"]))
        self._loaded = {**saved, "mine": saved["ranks"][trainer.global_rank] if same_ranks else None}

    def _refuse_changes(self, trainer: Trainer, module: LightningModule, then: dict[str, Any]) -> None:
        now = fingerprint(trainer, module)
        if then["world_size"] != now["world_size"]:
            data: object = trainer.datamodule  # type: ignore[attr-defined]
            ignored = {"world_size", "accumulate_grad_batches"} if isinstance(data, HasPosition) else set()
            then = {key: value for key, value in then.items() if key not in ignored}
        found = changes(then, now)
        if found and not self.allow_changes:
            raise SetupError(
                f"this run is not the one of the checkpoint: {'; '.join(found)}. Go on with the settings of the "
                "checkpoint, or on purpose with ExactResume(allow_changes=True)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop an iterator that knows nothing of the checkpoint."""
        self._fit_started = True
        if self._loaded and trainer.fit_loop._combined_loader is not None:
            # configure_optimizers has read trainer.estimated_stepping_batches: the iterator was made before the
            # position was loaded, and Lightning 2.6.6 keeps it (issue 20550).
            trainer.fit_loop._combined_loader.reset()
            trainer.fit_loop._combined_loader = None

    def _prepare_iterator(self, trainer: Trainer, load_states: Callable[[], None]) -> None:
        """Called in place of what loads the loaders' states, right before the first iterator of the fit is made."""
        if self._loaded and not self._fit_started:
            return
        self._stage = _stage(trainer) if self._loaded else ""
        mine = self._loaded["mine"] if self._loaded else None
        if self._stage in ("mid_epoch", "epoch_start"):
            set_epoch(trainer, trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        if self._stage == "mid_epoch" and mine and mine["epoch_start"]:
            set_randomness(trainer, mine["epoch_start"])
        elif self._stage in ("epoch_start", "epoch_end"):
            finish_epoch(trainer.fit_loop._combined_loader_states_to_load)
        self._epoch_start = randomness(trainer)
        load_states()
        if self._stage == "epoch_start" and mine:
            restore_parts(trainer)
            set_randomness(trainer, mine["now"]["randomness"])
            self._epoch_start = randomness(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, now that the iterator exists."""
        vars(trainer.fit_loop).pop("_load_combined_loader_states", None)
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        mine = loaded["mine"]
        if self._stage == "mid_epoch":
            self._pass_over(trainer)
        if mine:
            made = randomness(trainer)
            restore(trainer, pl_module, mine["now"])
            if self._stage == "epoch_start":
                set_randomness(trainer, made)  # the iterator was made from what was restored
            self._logged_before = dict(mine["now"]["logged"])
            self._metrics_before = dict(mine["now"]["logged_metrics"])
        if loaded["pending"]:
            trainer._logger_connector.log_metrics(dict(loaded["pending"]["metrics"]), step=loaded["pending"]["step"])
        self._set_logged_step = loaded["next_logged_step"]

    def _pass_over(self, trainer: Trainer) -> None:
        known = [knows_its_position(loader) for loader in loaders(trainer)]
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if not any(known) and trainer.fit_loop._data_fetcher is not None:
            pass_over(trainer, seen)
            warnings.filterwarnings("ignore", message=_FALSE_WARNING)
            self._filter = warnings.filters[0]
        elif not all(known):
            say("Some of the training loaders know their place and some do not: those begin the epoch anew.")

    # ---- during training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the epoch's order will be drawn from, where the iterator is about to be made."""
        loop = trainer.fit_loop
        if trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting:
            self._epoch_start = randomness(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the steps of the loggers as the undisturbed run would."""
        self._in_batch_end = False
        epoch_loop = trainer.fit_loop.epoch_loop
        if self._set_logged_step is not None:
            epoch_loop._batches_that_stepped, self._set_logged_step = self._set_logged_step, None
            self._drop_filter()
        elif self._logged_before:
            add_logged(trainer, self._logged_before)
        self._next_logged_step = epoch_loop._batches_that_stepped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add what was logged before the resume, and look ahead to a validation."""
        loop = trainer.fit_loop
        if self._logged_before:
            add_logged(trainer, self._logged_before)
        if self._next_logged_step is not None and not loop._should_accumulate():
            self._next_logged_step += 1
        self._in_batch_end = True
        fetcher = loop._data_fetcher
        if fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher):
            # The iterator of the validation is made, and takes a random number, before any hook of it is called.
            self._before_validation = capture(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The row of the last step has been logged by now."""
        self._in_batch_end = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a run goes on behind the validation."""
        self._before_validation = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was logged before the resume belongs to this epoch."""
        self._in_batch_end = False
        if self._stage:
            # Lightning leaves plateau schedulers out at the end of a resumed epoch, for want of metrics. They are here.
            trainer.fit_loop._restarting = False
            self._stage = ""
        add_logged(trainer, self._logged_before)
        row = epoch_means(self._logged_before) | finish_metrics(trainer, pl_module, self._metrics_before)
        if row:  # of an epoch that was stopped in its last validation
            step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
            trainer._logger_connector.log_metrics({key: torch.tensor(value) for key, value in row.items()}, step)
        self._logged_before, self._metrics_before = {}, {}

    # ---- saving

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add this callback's part, of all ranks."""
        inside = trainer.validating and not trainer.sanity_checking and self._before_validation is not None
        now = self._before_validation if inside else capture(trainer, pl_module)
        step = self._next_logged_step
        checkpoint[KEY] = {
            "ranks": _ranks.gather(trainer, {"now": now, "epoch_start": self._epoch_start}),
            "fingerprint": fingerprint(trainer, pl_module),
            "next_logged_step": trainer.fit_loop.epoch_loop._batches_that_stepped if step is None else step,
            "pending": self._pending(trainer),
        }

    def _pending(self, trainer: Trainer) -> dict[str, Any] | None:
        """The row that is logged after ``on_train_batch_end``, and so after a checkpoint that is saved there."""
        connector, loop = trainer._logger_connector, trainer.fit_loop
        if (
            not self._in_batch_end
            or loop._should_accumulate()
            or not connector.should_update_logs
            or not trainer.loggers
        ):
            return None
        metrics = {key: float(value) for key, value in connector.metrics["log"].items()}
        metrics.setdefault("epoch", float(trainer.current_epoch))
        return {"step": loop.epoch_loop._batches_that_stepped, "metrics": metrics}

    # ---- end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        super().teardown(trainer, pl_module, stage)
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        super().on_exception(trainer, pl_module, exception)
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        vars(trainer.fit_loop).pop("_load_combined_loader_states", None)
        self._drop_filter()

    def _drop_filter(self) -> None:
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None


def _stage(trainer: Trainer) -> Literal["epoch_start", "mid_epoch", "epoch_end"]:
    """Where the checkpoint that was loaded stands in its epoch."""
    epoch: Any = trainer.fit_loop.epoch_progress.total
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epoch.started == epoch.ready - 1 or epoch.completed == epoch.ready:
        return "epoch_start"
    return "epoch_end" if batches.is_last_batch or not batches.current.ready else "mid_epoch"
