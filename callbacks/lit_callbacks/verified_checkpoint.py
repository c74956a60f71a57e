"""Is there, at every moment, a checkpoint to go on from? Saved whole, verified, and never a bad one."""

import copy
import secrets
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_callbacks._deepspeed import is_zero
from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._shards import is_sharded, optimizers_as_they_are
from lit_callbacks.checkpointing import _writer
from lit_callbacks.checkpointing._durable import remove_leftovers
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing._health import any_rank, non_finite_tensors, open_anomaly
from lit_callbacks.checkpointing._rehearsal import rehearse
from lit_callbacks.checkpointing._schedule import SaveSchedule
from lit_callbacks.checkpointing.atomic_checkpoint_io import local, remove
from lit_callbacks.checkpointing.manifest import Manifest
from lit_callbacks.checkpointing.resume import newest_checkpoint
from lit_callbacks.checkpointing.shelf import committed, free_name, is_whole, link_last, prune, ranked
from lit_callbacks.markers import last_beat, mark_finished

_RANKING = ("best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score")
_BOOKS = (*_RANKING, "current_score", "_last_checkpoint_saved", "_last_global_step_saved")


class VerifiedCheckpoint(SaveSchedule):
    """A ``ModelCheckpoint`` whose files can be trusted, in the same place of any Lightning project.

    - *Whole*: written beside the final name, synced and renamed (:class:`AtomicCheckpointIO`, which it puts in place),
      and committed by a manifest with SHA-256, step and environment, written last. Nothing is overwritten; an older one
      is deleted when the newer one is durable. What a killed save has left is removed at the next start.
    - *Healthy*: weights or optimizer states that are not finite are never saved, and nothing is saved while a callback
      such as :class:`LossSpikeRecovery` is in the middle of an anomaly; it is made up for right after. A run that ends
      or is stopped inside an anomaly leaves ``suspect-step=….ckpt``, which a resume passes over.
    - *Loadable*: at the start of fit a checkpoint is saved, loaded back with ``weights_only=True`` and deleted. What
      could not be resumed does not start.
    - *Found again*: ``fit(ckpt_path="last")`` takes the newest checkpoint that verifies, by the steps in the manifests,
      and says what it passed over and how many steps that costs. Checkpoints of which none verifies are an error.

    A save that fails (a full disk) costs a warning; older files stay and training goes on, until ``max_failures`` in a
    row. A save that is due in front of a validation waits until that is over, and at an epoch's end until the next
    epoch starts: from there a run goes on exactly (Lightning loses the validation, or the epoch, otherwise). A run
    without ``monitor`` is also saved when it ends; ``finished.json`` in the run folder then says that it did.

    Without ``monitor`` the newest ``save_top_k`` are kept, with it the best. Use two to have both. ``last.ckpt`` is a
    link to the newest, for people. It serves ``lightning.pytorch``, single devices, DDP and, with one folder per
    checkpoint, sharded strategies. ``AsyncCheckpointIO`` may do the writing.

    Args:
        dirpath: Where; by default ``checkpoints`` in the folder of the logger or trainer, as for ``ModelCheckpoint``.
        filename: Name pattern, as for ``ModelCheckpoint``; by default ``{epoch}-{step}``. Metrics with ``/`` in their
            names get ``-``.
        monitor: The logged metric to rank by.
        mode: Whether low or high values of it are good.
        save_top_k: How many to keep; -1 for all.
        every_n_train_steps: Optimizer steps between saves. Without any of the three intervals, after each validation.
        train_time_interval: Time between saves.
        every_n_epochs: Epochs between saves.
        save_on_train_epoch_end: As for ``ModelCheckpoint``.
        auto_insert_metric_name: As for ``ModelCheckpoint``.
        max_failures: Saves that fail in a row before training stops.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: At the start of fit, if a checkpoint cannot be written, or not be loaded again; it names the values
            that are in the way. On a folder that is not on a local disk, and under ``pytorch_lightning``.
        CheckpointError: If ``max_failures`` saves in a row fail, or the last one does; if ``ckpt_path="last"`` finds
            only bad checkpoints; if a file that is to be loaded has changed.

    State: that of ``ModelCheckpoint`` and the name of the run. What is kept and best is read from the manifests. With
    other intervals, metric or mode than before, a resumed run is a new one to it, and what was saved before stays.

    Cost: per save, 1.0 to 1.15 of ``torch.save`` and ``fsync`` (``benchmarks/checkpoint_cost.py``), no copy in memory,
    and one pass over the weights; per start, one save more; per step, a comparison.

    Example:
        >>> VerifiedCheckpoint(every_n_train_steps=500).save_top_k
        2
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 2,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        auto_insert_metric_name: bool = True,
        max_failures: int = 3,
    ) -> None:
        if save_top_k < 1 and save_top_k != -1:
            raise ValueError(f"save_top_k must be at least 1, or -1 for all, got {save_top_k}")
        if max_failures < 1:
            raise ValueError(f"max_failures must be at least 1, got {max_failures}")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor="step" if monitor is None else monitor,
            mode="max" if monitor is None else mode,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            auto_insert_metric_name=auto_insert_metric_name,
            enable_version_counter=False,
        )
        self.max_failures = max_failures
        self.events = EventLog()
        self._run = ""
        self._attempt = 1
        self._suspect: str | None = None
        self._vetoed = False
        self._failures = 0
        self._size = 0
        self._expected_non_finite: set[str] = set()
        self._uninstall: Callable[[], None] | None = None
        self._empty_books = copy.deepcopy({name: getattr(self, name) for name in _BOOKS})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")} | {"_uninstall": None}

    @property
    def folder(self) -> Path:
        """Where the checkpoints are; from setup on."""
        return local(str(self.dirpath))

    # ---- start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be served, put the writing in place, and clear away what killed saves have left."""
        if type(trainer).__module__.startswith("pytorch_lightning"):
            raise SetupError("VerifiedCheckpoint serves lightning.pytorch, and this Trainer is pytorch_lightning's.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if self._is_first(trainer):
            self._uninstall = _writer.install(trainer)
        if stage != "fit" or _is_trial(trainer):
            return
        try:
            folder = self.folder
        except CheckpointError:
            raise SetupError(
                f"VerifiedCheckpoint writes to local disks, and dirpath is {self.dirpath}. Save to a local folder and "
                "copy from there, or use ModelCheckpoint."
            ) from None
        if trainer.global_step == 0:  # otherwise a trainer goes on with what it has done before
            vars(self).update(copy.deepcopy(self._empty_books))
        self._wanted, self._vetoed, self._failures = None, False, 0
        self.events = EventLog(run_folder(trainer))
        plain = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        others = [c for c in plain if not isinstance(c, VerifiedCheckpoint)]
        if self._is_first(trainer) and any(c.save_last or c.dirpath == self.dirpath for c in others):
            say(
                "Beside VerifiedCheckpoint there is a ModelCheckpoint with a last.ckpt or in the same folder: then "
                "ckpt_path='last' goes by the times of files. Save with another VerifiedCheckpoint, or elsewhere."
            )
        attempt = 0
        if trainer.is_global_zero:
            remove_leftovers(folder, is_whole, remove)
            attempt = 1 + max((kept.manifest.attempt for kept in committed(folder)), default=0)
        new = secrets.token_hex(8) if trainer.global_step == 0 else self._run
        self._run, self._attempt = trainer.strategy.broadcast((new, attempt))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse, and find out what is there already."""
        super().on_train_start(trainer, pl_module)
        if _is_trial(trainer):
            return
        self._recall(trainer)
        if trainer.global_step == 0 and is_sharded(pl_module):
            for optimizer in trainer.optimizers:  # loaded from a checkpoint that others made
                if not is_zero(optimizer):
                    optimizer.state.clear()
        others = {name for name, _ in pl_module.named_buffers()}  # infinite by intention, as masks are
        others |= {name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad}
        self._expected_non_finite = others.intersection(non_finite_tensors(trainer, pl_module))
        if self._is_first(trainer):
            mark_finished(trainer, None)
            self._rehearse(trainer)

    def _is_first(self, trainer: Trainer) -> bool:
        return self is next(c for c in trainer.checkpoint_callbacks if isinstance(c, VerifiedCheckpoint))

    def _rehearse(self, trainer: Trainer) -> None:
        with optimizers_as_they_are(trainer):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        problem = ""
        if trainer.is_global_zero and not trainer.strategy.restore_checkpoint_after_setup:
            try:
                size = rehearse(checkpoint, self.folder)
                for callback in trainer.checkpoint_callbacks:
                    if isinstance(callback, VerifiedCheckpoint):
                        callback._size = size
            except SetupError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise SetupError(problem)

    def _recall(self, trainer: Trainer) -> None:
        """Know of the checkpoints of this run that are in the folder, also of those a killed process has saved."""
        found: list[tuple[str, float]] = []
        if trainer.is_global_zero:
            found = ranked(self.folder, self._run, self.state_key, trainer.global_step, self.mode)
        found = trainer.strategy.broadcast(found)[: self.save_top_k if self.save_top_k > 0 else None]
        vars(self).update(copy.deepcopy({name: self._empty_books[name] for name in _RANKING}))
        if not found:
            return
        self.best_k_models = {path: torch.tensor(score) for path, score in found}
        self.best_model_path, score = found[0]
        self.best_model_score = torch.tensor(score)
        if len(found) == self.save_top_k:
            self.kth_best_model_path, score = found[-1]
            self.kth_value = torch.tensor(score)

    # ---- end of training

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        if _is_trial(trainer):
            return
        unsaved = self._last_global_step_saved != trainer.global_step
        if self.monitor == "step" and unsaved and self._wanted is None:
            self._want(trainer)
        self._save_wanted(trainer, at_last=True)
        self._settle(trainer)
        if self._failures and self.monitor == "step":
            raise CheckpointError(
                f"The run has made its last step, {trainer.global_step}, but the checkpoint of it could not be saved. "
                f"Make room, and go on from {self.best_model_path or 'the beginning'}."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run has come to its end; also one that was killed when only this was left to do."""
        if not _is_trial(trainer) and self._is_first(trainer):
            mark_finished(trainer, trainer.global_step)

    def save_now(self, trainer: Trainer, place: _writer.Place = "between_steps") -> str | None:
        """Save at once, because training stops here. All ranks together.

        Args:
            trainer: The trainer.
            place: Where training stands.

        Returns:
            The checkpoint; None if there is no state that could be kept.
        """
        if self._last_global_step_saved != trainer.global_step:
            self._place = place
            self._want(trainer)
            self._save_wanted(trainer, at_last=True)
            self._place = "between_steps"
        self._settle(trainer)
        saved = self._last_global_step_saved == trainer.global_step
        return self._last_checkpoint_saved if saved else None

    # ---- whether

    def _save_wanted(self, trainer: Trainer, at_last: bool = False) -> None:
        """Save what is due, if the state may be kept; if not now, at the next step at which it may."""
        if self._wanted is None:
            return
        if int(self._wanted["step"]) != trainer.global_step:
            self._want(trainer)
        metrics = self._wanted
        if self.monitor not in metrics:
            if self.monitor is not None and trainer.fit_loop.epoch_loop.val_loop._has_run:
                raise SetupError(
                    f"VerifiedCheckpoint(monitor={self.monitor!r}) found no such metric after a validation; logged are "
                    f"{', '.join(sorted(metrics))}."
                )
            return
        self._settle(trainer, wait=False)  # a ghost must not be the best
        module = trainer.lightning_module
        anomaly = open_anomaly(trainer)
        if anomaly and not at_last:
            self._veto(trainer, f"{anomaly} is in the middle of an anomaly", "It is made up for when that is over.")
            return
        self._wanted = None
        bad = [name for name in non_finite_tensors(trainer, module) if name not in self._expected_non_finite]
        if any_rank(trainer, bool(bad)):
            where = bad[0] if bad else "of another rank"
            self._veto(trainer, f"not finite: {where}", "The last good checkpoint stands.")
        elif not torch.isfinite(torch.as_tensor(metrics[str(self.monitor)])).all():
            self._veto(trainer, f"{self.monitor} is {float(metrics[str(self.monitor)])}", "The best ones stand.")
        elif anomaly:
            self._save_suspect(trainer, metrics, f"{anomaly} was in the middle of an anomaly when it was saved")
        else:
            self._vetoed = False
            self._attempt_save(trainer, lambda: self._save_topk_checkpoint(trainer, metrics))

    def _veto(self, trainer: Trainer, reason: str, consequence: str) -> None:
        if not self._vetoed:
            self.events.write(step=trainer.global_step, event="not_saved", reason=reason)
            say(f"step {trainer.global_step}: no checkpoint is saved: {reason}. {consequence}")
        self._vetoed = True

    def _save_suspect(self, trainer: Trainer, metrics: dict[str, Tensor], reason: str) -> None:
        self._suspect = reason
        try:
            name = self._free_name(trainer, self.format_checkpoint_name(metrics, "suspect-{step}"))
            self._attempt_save(trainer, lambda: self._save_checkpoint(trainer, name))
        finally:
            self._suspect = None

    def _attempt_save(self, trainer: Trainer, save: Callable[[], None]) -> None:
        books = {name: getattr(self, name) for name in _BOOKS} | {"best_k_models": dict(self.best_k_models)}
        try:
            save()
        except _writer.NotSavedError as error:
            vars(self).update(books)
            self._recall(trainer)  # the one that failed may be an earlier one, in the background
            self._count_failure(trainer, error)
        else:
            if self._last_global_step_saved == trainer.global_step:
                self._failures = 0

    def _count_failure(self, trainer: Trainer, error: _writer.NotSavedError) -> None:
        self._failures += 1
        self.events.write(step=trainer.global_step, event="save_failed", error=str(error), in_a_row=self._failures)
        stands = self.best_model_path or "none yet"
        text = f"step {trainer.global_step}: the checkpoint could not be saved: {error}. Last one: {stands}."
        if self._failures >= self.max_failures:
            raise CheckpointError(f"{text} Stopped after {self._failures} saves in a row that failed.")
        say(f"{text} Training goes on; it stops after {self.max_failures} such saves in a row.")

    # ---- how

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        ranked = self.best_k_models.get(filepath)
        manifest = Manifest(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            attempt=self._attempt,
            run=self._run,
            owner=self.state_key,
            score=None if ranked is None else float(ranked),
            suspect=self._suspect,
            environment=_writer.environment(trainer),
        )
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        with optimizers_as_they_are(trainer):
            _writer.write(trainer, Path(filepath), manifest, self._size, self._place)
        self._tidy(trainer)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _tidy(self, trainer: Trainer) -> None:
        """Let go of older ones, once the newer one is there: a save in the background may not have come so far."""
        if not trainer.is_global_zero or not is_whole(Path(self._last_checkpoint_saved)):
            return
        link_last(self.folder)
        keep = [Path(path) for path in (*self.best_k_models, self._last_checkpoint_saved, trainer.ckpt_path) if path]
        prune(self.folder, self._run, self.state_key, trainer.global_step, keep)

    def _settle(self, trainer: Trainer, wait: bool = True) -> None:
        """Wait for what is written in the background, or only hear of its failure."""
        try:
            _writer.finish(trainer, wait)
        except _writer.NotSavedError as error:
            self._last_global_step_saved = -1  # whichever it was
            self._recall(trainer)
            self._count_failure(trainer, error)
        if self._last_checkpoint_saved:
            self._tidy(trainer)

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Trainer, del_filepath: str | None = None
    ) -> str:
        return self._free_name(trainer, self.format_checkpoint_name(monitor_candidates))

    def _free_name(self, trainer: Trainer, name: str) -> str:
        """The name, or one with a version, of nothing that is there or is being written in the background."""
        ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, VerifiedCheckpoint)]
        given = {path for c in ours for path in (*c.best_k_models, c._last_checkpoint_saved)}
        return trainer.strategy.broadcast(str(free_name(Path(name), given)))

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """As ``ModelCheckpoint`` does it, but for ``/`` in the names of metrics, which would make folders: ``-``."""
        name = super().format_checkpoint_name(metrics, filename, ver, prefix)
        folder = f"{self.dirpath}/" if self.dirpath else ""
        return folder + name.removeprefix(folder).replace("/", "-")

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Nothing: what may go is decided by what is in the folder, when the new one is durable."""

    # ---- resume

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What ``ckpt_path="last"`` means: Lightning asks here, and would take the newest file by its time."""
        ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, VerifiedCheckpoint)]
        folders = {Path(str(c._ModelCheckpoint__resolve_ckpt_dir(trainer))) for c in ours}  # type: ignore[attr-defined]
        point = newest_checkpoint(folders, last_beat(run_folder(trainer)))
        if point is None:
            return set()
        if self is ours[0]:
            say(point.describe())
        return {str(point.path)}

    def state_dict(self) -> dict[str, Any]:
        """The state of a ``ModelCheckpoint``, and which run this is."""
        return {**super().state_dict(), "run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Belong to the same run; which checkpoints it has is read from the folder."""
        self._run = state_dict["run"]

    # ---- end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take away what was put in place."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take away what was put in place; nothing is saved in the middle of a step."""
        self._leave()

    def _leave(self) -> None:
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
