"""What ``fit`` says at its end: a table, and where it has failed one paragraph."""

from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.memory import is_oom_error

import lit_callbacks
from lit_transformer.errors import TrainingStopped, UsageError
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.outcome import go_on_command, outcome_table


def print_outcome(trainer: Trainer, command: Callable[[str], str]) -> None:
    """The verdict, the numbers, and what to type next, which may depend on the verdict."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback.diagnosis for callback in callbacks if isinstance(callback, lit_callbacks.Dashboard)]
    diagnosis = found[0] if found else None
    verdict, sentences = (diagnosis.verdict, diagnosis.sentences) if diagnosis else ("", ())
    table = outcome_table(sentences, trainer.callback_metrics, trainer.global_step, command(verdict))
    print(f"\n{table}", flush=True)


def print_early_end(trainer: Trainer, run: RunFolder, root: Path, diverged: bool) -> None:
    """How far a run came that was stopped, or failed, and how to go on with it."""
    if not trainer.is_global_zero or trainer.global_step == 0:
        return
    # After a KeyboardInterrupt Lightning leaves it as it is, and reading metrics could then wait for other ranks.
    trainer.state.stage = None
    command = go_on_command(run, root, diverged)
    print_outcome(trainer, lambda verdict: command)


def explain_end(error: BaseException, trainer: Trainer, settings: Namespace) -> None:
    """Raise what the command line prints as one paragraph, where there is such a thing.

    Raises:
        UsageError: For what the user can change: configuration, devices, memory.
        TrainingStopped: If recovery has given up.
        KeyboardInterrupt: After Ctrl-C, of which Lightning makes an exit with code 1.
    """
    if isinstance(error, (MisconfigurationException, lit_callbacks.SetupError)):
        raise UsageError(str(error)) from error
    if isinstance(error, lit_callbacks.DivergenceError):
        raise TrainingStopped(str(error)) from error
    if isinstance(error, ValueError) and str(error).strip().startswith("`val_check_interval`"):
        raise UsageError(_between_validations(trainer)) from error
    if isinstance(error, RuntimeError) and "DeepSpeed strategy is only supported on CUDA" in str(error):
        raise UsageError(f"{error} Take strategy ddp, or fsdp2") from error
    if isinstance(error, RuntimeError) and is_oom_error(error):
        raise UsageError(out_of_memory(error, settings)) from error
    if isinstance(error, SystemExit) and trainer.interrupted and error.code == 1:
        raise KeyboardInterrupt from None


def _between_validations(trainer: Trainer) -> str:
    batches = trainer.fit_loop.max_batches
    return (
        f"trainer.val_check_interval is {trainer.val_check_interval} batches, and an epoch has only {batches}: set it "
        f"to at most {batches}, or trainer.check_val_every_n_epoch to null, which counts batches over epochs"
    )


def out_of_memory(error: RuntimeError, settings: Namespace) -> str:
    """What to change when memory was not enough."""
    data, trainer = settings.data.get("init_args", {}), settings.trainer
    batch, length = data.get("batch_size", "?"), data.get("block_size", "?")
    what = str(error).splitlines()[0].rstrip(".")
    return (
        f"out of memory: {what}. Three settings make a step smaller: data.init_args.batch_size (it is {batch}; "
        f"trainer.accumulate_grad_batches keeps the batch), data.init_args.block_size (it is {length}), and "
        f"trainer.precision (it is {trainer.precision}; bf16-mixed needs less)"
    )
