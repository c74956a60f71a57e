"""fit, validate, test and predict: a LightningCLI with run folders, default callbacks and one-paragraph errors."""

import logging
import re
import sys
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import lit_callbacks
from lit_transformer.commands.checkpoints import (
    check_for_deepspeed,
    find_run,
    load_checkpoint,
    locate,
    of_a_run,
    read_checkpoint,
    resume_point,
)
from lit_transformer.commands.endings import explain_end, print_early_end, print_outcome
from lit_transformer.commands.parser import OneParagraphParser
from lit_transformer.errors import UsageError
from lit_transformer.recipe import LitRecipe
from lit_transformer.run.config_errors import explain
from lit_transformer.run.config_files import with_config
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.loggers import make_loggers
from lit_transformer.run.machine import check_machine
from lit_transformer.run.metrics_file import MetricsFile
from lit_transformer.run.outcome import next_command
from lit_transformer.run.precision import choose_precision
from lit_transformer.run.predictions import PredictionsFile
from lit_transformer.run.progress import RunProgress
from lit_transformer.run.report import FitReport, metrics_table
from lit_transformer.run.resume import check_same_configuration
from lit_transformer.run.saved_config import SavedConfig
from lit_transformer.strategies.deferred import deferred_weights

_SHARDED = ("fsdp", "tensor_parallel", "tensorparallel", "modelparallel", "deepspeed")
# A callback's top-level key: LossSpikeRecovery is loss_spike_recovery.
_DEFAULT_CALLBACKS = {
    re.sub(r"(?<!^)(?=[A-Z])", "_", type(callback).__name__).lower(): type(callback)
    for callback in [*lit_callbacks.recommended(), lit_callbacks.RecipeCheck()]
}


class TrainingCLI(LightningCLI):
    """Model, data, trainer, default callbacks and run folder from one configuration.

    The callbacks of :func:`lit_callbacks.recommended`, and RecipeCheck, are top-level keys, so that a configuration can
    set or, with null, leave out each of them without repeating the others.
    """

    def __init__(self, words: list[str]) -> None:
        self.command = words[0]
        self.run: RunFolder | None = None
        self.checkpoint: dict[str, Any] | None = None
        super().__init__(
            LitRecipe,
            LightningDataModule,
            save_config_callback=None,
            parser_class=OneParagraphParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=with_config(words, find_run, read_checkpoint),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is run: making the parsers of all four takes a second longer."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    @property
    def settings(self) -> Namespace:
        """The configuration of this command."""
        settings: Namespace = self.config[self.subcommand]
        return settings

    def _strategy_is(self, *names: str) -> bool:
        return any(name in str(self.settings.trainer.strategy).lower() for name in names)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys beside trainer, model and data."""
        for source, target in (("vocab_size", "config.vocab_size"), ("labels", "labels"), ("eos_id", "eos_id")):
            known = partial(self._attribute, source)
            parser.link_arguments("data", f"model.init_args.{target}", compute_fn=known, apply_on="instantiate")
        add = parser.add_argument
        add("--run", type=str | None, default=None, help="Name of the run, made up from the time if null.")
        add("--wandb", type=bool, default=False, help="Log to W&B as well, offline without a key.")
        add("--tensorboard", type=bool, default=False, help="Log to TensorBoard as well.")
        add("--checkpoint_every_n_steps", type=int, default=500, help="Optimizer steps between periodic checkpoints.")
        add("--allow_config_change", type=bool, default=False, help="Go on from a checkpoint of other settings.")
        for key, callback in _DEFAULT_CALLBACKS.items():
            default = {"class_path": f"lit_callbacks.{callback.__name__}"}
            add(f"--{key}", type=callback | None, default=default, help="On by default; null leaves it out.")
        shutdown = lit_callbacks.GracefulShutdown  # of fit alone, whose configuration the other commands take too
        default = {"class_path": f"lit_callbacks.{shutdown.__name__}"}
        add("--graceful_shutdown", type=shutdown | None, default=default, help="On by default in fit; or null.")

    def _attribute(self, name: str, data: LightningDataModule) -> Any:
        """What a model takes from the data, or from what the checkpoint says of it; None where there is no such."""
        load = getattr(data, "load_vocabulary", None)
        state = (self.checkpoint or {}).get(type(data).__qualname__)
        if load is not None and state is not None and self.subcommand != "fit":
            load(state)
        return getattr(data, name, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words that were given; Lightning warns when the process has words of its own as well."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's way, which merges a checkpoint's hyperparameters over the configuration and the flags."""

    def before_instantiate_classes(self) -> None:
        """Settle precision and checkpoint before anything is built."""
        settings = self.settings
        if settings.checkpoint_every_n_steps < 1:
            raise UsageError(f"checkpoint_every_n_steps must be at least 1, got {settings.checkpoint_every_n_steps}")
        if crowded := check_machine(settings.trainer):
            _say(crowded)
        self.shows_metrics = bool(settings.get("verbose"))
        if self.shows_metrics:
            settings.verbose = False  # Lightning's table cuts the names of layers off
        self.precision_reason = "as configured"
        if settings.trainer.precision is None:
            settings.trainer.precision, self.precision_reason = choose_precision(settings.trainer.accelerator)
        self.root = Path(settings.trainer.default_root_dir or "runs")
        self._find_models_to_start_from(settings.model.get("init_args"))
        if settings.ckpt_path in ("last", "best"):
            self.run = find_run(self.root, settings.run)
            if self.subcommand == "fit" and settings.ckpt_path == "last":
                settings.ckpt_path = self._go_on(self.run)
            else:
                settings.ckpt_path = str(locate(self.root, self.run.path.name, settings.ckpt_path))
        elif settings.ckpt_path is None and self.subcommand != "fit":
            raise UsageError(
                f"{self.subcommand} needs a checkpoint: --ckpt_path FILE, or --ckpt_path best with --run NAME"
            )
        elif settings.ckpt_path is not None and settings.run is not None and self.subcommand == "fit":
            run = RunFolder(self.root / settings.run)
            self.run = run if run.owns(settings.ckpt_path) else None
        if settings.ckpt_path is not None:
            self.checkpoint = load_checkpoint(settings.ckpt_path, weights=not self._strategy_is(*_SHARDED))
            if self._strategy_is("deepspeed"):
                check_for_deepspeed(settings.ckpt_path, self.command)

    @staticmethod
    def _find_models_to_start_from(model: Namespace | None) -> None:
        """Where a run is named whose weights are wanted, its best checkpoint; written down as that."""
        for place, key in ((model, "init_from"), (model and model.get("distillation"), "teacher")):
            if place is not None and isinstance(place.get(key), str):
                place[key] = of_a_run(place[key])

    def _go_on(self, run: RunFolder) -> str | None:
        """The checkpoint that a run goes on from; None where it was killed before its first: it begins anew."""
        point = resume_point(run)
        if point is None:
            _say(f"The run in {run.path} has saved nothing yet: it begins with step 0.")
            return None
        _say(point.describe())
        return str(point.path)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a constructor refuses is the user's to fix."""
        try:
            with deferred_weights() if self._strategy_is(*_SHARDED) else nullcontext():
                super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            if self.run is not None:
                self.run.remove_if_empty()
            raise error if isinstance(error, UsageError) else UsageError(explain(str(error))) from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if subcommand == "fit" and self.run is not None and self.trainer.interrupted:
                with suppress(Exception):  # of a device or console that fails: what it was is in the error itself
                    print_early_end(self.trainer, self.run, self.root, isinstance(error, lit_callbacks.DivergenceError))
            explain_end(error, self.trainer, self.settings)
            raise
        finally:
            if self.run is not None:
                self.run.remove_if_empty()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the default callbacks and, for fit, a run folder."""
        if self.checkpoint is not None and not self.settings.allow_config_change:
            data = self._get(self.config_init, "data") if self.subcommand == "fit" else None
            model = self._get(self.config_init, "model")
            check_same_configuration(self.checkpoint, model, data, self.settings.ckpt_path)
        trainer = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        callbacks = [self._get(self.config_init, key) for key in _DEFAULT_CALLBACKS]
        callbacks = [callback for callback in callbacks if callback is not None]
        for callback in callbacks:
            if isinstance(callback, lit_callbacks.ExactResume):
                callback.allow_changes |= self.settings.allow_config_change
        if self.subcommand == "fit" and not trainer["fast_dev_run"]:
            callbacks += self._prepare_run(trainer)
        else:
            trainer["logger"] = trainer["logger"] or False
        if self.subcommand == "predict":
            folder = self.root if self.run is None else self.run.path
            callbacks.append(PredictionsFile(folder / "predictions.csv"))
        own_bar = any(isinstance(callback, ProgressBar) for callback in trainer["callbacks"] or [])
        if trainer["enable_progress_bar"] is not False and not own_bar:
            callbacks.append(RunProgress())  # after the report, whose lines come before the bar
        return self._instantiate_trainer(trainer, callbacks)

    def _prepare_run(self, trainer: dict[str, Any]) -> list[Callback]:
        """Make or reopen the run folder, and point everything that writes at it."""
        settings = self.settings
        self.run = run = self.run or RunFolder.create(self.root, settings.run)
        resumed = self.checkpoint or {"global_step": 0}
        pending = (resumed.get("exact_resume") or {}).get("pending")
        trainer["default_root_dir"] = str(run.path)
        metrics = MetricsFile(run.metrics, resumed["global_step"], pending)
        asked = (settings.wandb, settings.tensorboard, trainer["logger"])
        loggers = make_loggers(run, metrics, *asked, secret_words=lit_callbacks.redacted(sys.argv) != sys.argv)
        trainer["logger"] = [metrics, *(lit_callbacks.shield(logger, patience=10.0) for logger in loggers[1:])]
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))[self.subcommand]
        dumped = lit_callbacks.redacted(dumped)
        self.report = FitReport(
            run, f"{settings.trainer.precision} ({self.precision_reason})", lit_callbacks.EventLog(run.path).write
        )
        callbacks: list[Callback] = [LearningRateMonitor(), self.report, SavedConfig(run, dumped)]
        if trainer["enable_checkpointing"] is False:
            return callbacks
        checkpoint = lit_callbacks.VerifiedCheckpoint
        callbacks.append(checkpoint(run.checkpoints, "{step}", every_n_train_steps=settings.checkpoint_every_n_steps))
        if (shutdown := self._get(self.config_init, "graceful_shutdown")) is not None:
            callbacks.append(shutdown)
        if trainer["limit_val_batches"] != 0:
            callbacks.append(checkpoint(run.checkpoints, "best-{step}", monitor="val/loss", save_top_k=1))
        return callbacks

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.run is None or not self.trainer.is_global_zero:
            return
        if self.checkpoint is not None and self.trainer.global_step == self.checkpoint["global_step"]:
            print(f"The run is at step {self.trainer.global_step} already; to go on, raise --trainer.max_steps.")
        print_outcome(self.trainer, partial(next_command, self.run, self.root))
        self.report.print_places()

    def after_validate(self) -> None:
        """Say what was found."""
        if self.shows_metrics and self.trainer.is_global_zero:
            print(metrics_table(self.trainer.callback_metrics, "val"))

    def after_test(self) -> None:
        """Say what was found."""
        if self.shows_metrics and self.trainer.is_global_zero:
            print(metrics_table(self.trainer.callback_metrics, "test"))


def run_training_command(words: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UsageError: For anything wrong in the words, the configuration or the files they name.
    """
    quieten()
    if words[0] not in LightningCLI.subcommands():
        others = "check plot_schedule lr_find batch_size_find memory report generate export consolidate dashboard"
        commands = ", ".join([*LightningCLI.subcommands(), *others.split()])
        raise UsageError(f"unknown command {words[0]}; the commands are {commands}")
    TrainingCLI(words)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def quieten() -> None:
    """Leave out what Lightning says to everybody and nobody here can act on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(("💡", "GPU available", "TPU available", "HPU available"))
    )
    warnings.filterwarnings("ignore", message="The '.*' does not have many workers")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
