"""What happens when the machine is taken away? The run is saved where it stands, and says how it ended."""

import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._member import Member
from lit_callbacks._signals import NAMES, SignalWatch
from lit_callbacks.markers import STOPPED, clear
from lit_callbacks.protocols import CanSaveNow

_TIME_LIMIT = "time limit"


class GracefulExit(SystemExit):
    """Training was asked to stop, and has stopped between two steps. Its code is 143, or 130 after Ctrl-C."""

    def __init__(self, reason: str, step: int, checkpoint: str | None) -> None:
        super().__init__(exit_code(reason))
        self.reason, self.step, self.checkpoint = reason, step, checkpoint

    def __str__(self) -> str:
        return f"{self.reason} at step {self.step}"


def exit_code(reason: str) -> int:
    """The exit code that says why a process ended, as shells have it: 128 and the signal.

    Example:
        >>> exit_code("SIGINT"), exit_code("SIGTERM"), exit_code("time limit")
        (130, 143, 143)
    """
    return 130 if reason == "SIGINT" else 143


class GracefulShutdown(Member):
    """Stop at the next safe place when a signal or a time limit says so, with a checkpoint, and an honest exit code.

    Lightning 2.6.6 ends with code 0 and without a checkpoint on SIGTERM, so that launchers take the run for finished.
    Here the first SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, or the time limit, sets a flag. All ranks agree on it after each
    optimizer step, and after each batch of a validation, save through :class:`VerifiedCheckpoint`, and leave with
    :class:`GracefulExit`: code 143, after Ctrl-C 130. A run that is stopped in a validation, or in front of one, does
    the whole validation when it goes on. A run that has made its last step, or that something else has stopped, as
    early stopping does, comes to its end instead.

    The second signal stops at once; all files are whole at any moment. If no safe place is reached in ``grace_seconds``
    after the first signal, because a batch hangs, the process ends with the stacks of its threads on standard error.
    Saving takes the time it takes. Where a SIGTERM goes to the whole process group (torchrun does that) and the loader
    has workers, these end at once, so that only the batch under way is finished: in the middle of an accumulation
    window the run ends unsaved.

    Launchers have exit codes of their own, so ``stopped.json`` in the run folder says reason, step, exit code and
    checkpoint; it is gone when the run goes on, and ``finished.json`` is there when it has come to its end.

    Under SLURM with automatic requeueing, the requeue signal also requeues the job, and leaves the checkpoint where
    Lightning looks for it in the next job. Needs a callback with ``save_now``, as :class:`VerifiedCheckpoint`. Handlers
    are only taken over in the main thread, and given back.

    Args:
        time_limit: Seconds after which to stop, from the start of fit, by the clock of rank zero.
        grace_seconds: Seconds after the first signal in which a safe place must be reached.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: At setup, if there is nothing to save with.
        GracefulExit: When it stops.

    State: none.

    Cost: on one device a flag per step; on several an all-reduce of one number on the CPU.

    Example:
        >>> GracefulShutdown(time_limit=3600.0).grace_seconds
        60.0
    """

    serves_shards = True
    serves_zero = True

    order = 3

    def __init__(self, time_limit: float | None = None, grace_seconds: float = 60.0) -> None:
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
        if not 0 < grace_seconds < math.inf:
            raise ValueError(f"grace_seconds must be above 0 and finite, got {grace_seconds}")
        super().__init__()
        self.time_limit, self.grace_seconds = time_limit, grace_seconds
        self.events = EventLog()
        self._folder = Path()
        self._watch: SignalWatch | None = None
        self._reasons: tuple[str, ...] = ()
        self._group: Any = None
        self._deadline = math.inf
        self._agree_in_validation = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None, "_group": None}

    # ---- start and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to promise what cannot be kept, and come last: other callbacks finish their step first."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if _saver(trainer) is None:
            raise SetupError(
                "GracefulShutdown saves through a VerifiedCheckpoint, and there is none: add "
                "VerifiedCheckpoint(every_n_train_steps=500) to the callbacks."
            )
        trainer.callbacks = [c for c in callbacks if c is not self] + [self]  # type: ignore[attr-defined]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder = run_folder(trainer)
        self.events = EventLog(self._folder)
        if trainer.is_global_zero:
            clear(self._folder, STOPPED)
        self._deadline = math.inf if self.time_limit is None else time.monotonic() + self.time_limit
        names = tuple(dict.fromkeys([*NAMES, *filter(None, [_requeue_signal(trainer)])]))
        self._reasons = (*names, _TIME_LIMIT)
        self._watch = SignalWatch(self.grace_seconds, exit_code, self._first, self._second, names)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have a group that needs no device."""
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, whose SIGTERM handler waits for the other ranks inside the handler."""
        if self._watch is not None:
            self._watch.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        if self._watch is not None:
            self._watch.install()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.restore()
            self._watch = None

    def _first(self, name: str) -> None:
        if name == "SIGINT":
            say("Stopping after this step; press Ctrl-C again to stop at once.")

    def _second(self, name: str) -> None:
        if name == "SIGINT":
            raise KeyboardInterrupt
        raise SystemExit(exit_code(name))

    # ---- safe places

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two optimizer steps; at an epoch's last batch without a validation, wait for the epoch's end."""
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return
        fetcher = loop._data_fetcher
        validates = fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)
        if validates or not loop.epoch_loop._num_ready_batches_reached():
            self._stop_if_asked(trainer, "validation" if validates else "between_steps")
        elif self._watch is not None:
            self._watch.arrived()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between two epochs."""
        if trainer.global_step > 0:
            self._stop_if_asked(trainer, "epoch_start")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether the ranks will be together after each batch of this validation."""
        self._agree_in_validation = trainer.state.fn == "fit" and self._same_on_all_ranks(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """In a validation: no weight changes here."""
        if self._watch is None or not self._agree_in_validation:
            return
        if trainer.sanity_checking:
            self._stop_if_asked(trainer, "nothing_done")
        elif not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Behind a validation in the middle of an epoch."""
        loop = trainer.fit_loop
        if trainer.state.fn != "fit" or trainer.sanity_checking or loop._should_accumulate():
            return
        if not loop.epoch_loop._num_ready_batches_reached():
            self._stop_if_asked(trainer, "between_steps")

    def _same_on_all_ranks(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return True
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        total = sum(counts) if isinstance(counts, list) else counts
        seen = torch.tensor([total, -total], dtype=torch.float64)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        return bool(seen.isfinite().all()) and seen[0].item() == -seen[1].item()

    def _stop_if_asked(
        self, trainer: Trainer, place: Literal["between_steps", "validation", "epoch_start", "nothing_done"]
    ) -> None:
        if self._watch is None or (reason := self._agreed_reason(trainer, self._watch)) is None:
            return
        self._watch.arrived()
        if _is_over(trainer):
            return
        step, checkpoint = trainer.global_step, None
        saver = _saver(trainer)
        if place != "nothing_done" and saver is not None:
            checkpoint = saver.save_now(trainer, place)
        trainer.strategy.barrier("shutdown")
        error = GracefulExit(reason, step, checkpoint)
        what = f"saved as {checkpoint}" if checkpoint else "not saved; the last checkpoint stands"
        if place == "nothing_done":
            what = "nothing was done yet"
        self.events.write(step=step, event="shutdown", reason=reason, checkpoint=checkpoint, exit_code=error.code)
        say(f"step {step}: stopped by {reason}: {what}.")
        if trainer.is_global_zero:
            facts = {"reason": reason, "step": step, "exit_code": error.code, "checkpoint": checkpoint}
            try:  # the other ranks wait at the barrier, and the exit code says enough
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / STOPPED).write_text(json.dumps(facts) + "\n", encoding="utf-8")
                if reason == _requeue_signal(trainer):
                    _requeue(trainer, checkpoint)
            except OSError as problem:
                say(f"step {step}: stopped, but not all could be written down: {problem}")
        trainer.strategy.barrier("requeued")
        raise error

    def _agreed_reason(self, trainer: Trainer, watch: SignalWatch) -> str | None:
        """What any rank was told; the same on all ranks."""
        reason = watch.received
        if reason is None and trainer.is_global_zero and time.monotonic() >= self._deadline:
            reason = _TIME_LIMIT
        number = 0 if reason is None else 1 + self._reasons.index(reason)
        if trainer.world_size > 1:
            told = torch.tensor([number])
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
            number = int(told.item())
        return None if number == 0 else self._reasons[number - 1]


def _is_over(trainer: Trainer) -> bool:
    """Whether no step follows: nothing that is stopped here would be done when the run goes on, or too much."""
    return trainer.global_step == trainer.max_steps or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def _saver(trainer: Trainer) -> CanSaveNow | None:
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, CanSaveNow)), None)


def _requeue_signal(trainer: Trainer) -> str | None:
    """The signal that SLURM announces the end of the job with, where the job is to be queued again."""
    environment = trainer._accelerator_connector.cluster_environment
    if type(environment).__name__ != "SLURMEnvironment" or not getattr(environment, "auto_requeue", False):
        return None
    number = getattr(environment, "requeue_signal", None)
    return "SIGUSR1" if number is None else number.name


def _requeue(trainer: Trainer, checkpoint: str | None) -> None:
    """Put the job back into the queue, and the checkpoint where Lightning looks for it when that starts."""
    if checkpoint is None:
        say("The SLURM job is not queued again, for nothing was saved: submit it with ckpt_path='last'.")
        return
    # Lightning prefers this link also in later jobs, also to one killed before it stops: so it follows the newest.
    saved = Path(checkpoint).resolve()
    last = saved.with_name("last.ckpt")
    link = Path(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
    link.symlink_to(last if last.is_symlink() and last.exists() else saved)
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    scontrol = shutil.which("scontrol")
    code = subprocess.call([scontrol, "requeue", job]) if scontrol else None
    if code == 0:
        say(f"SLURM job {job} is queued again.")
    else:
        why = "there is no scontrol" if code is None else f"scontrol ended with {code}"
        say(f"SLURM job {job} could not be queued again: {why}. Submit it again; it goes on from {link}.")
