"""What a configuration asks of the machine, and whether that is there: said before anything is launched."""

import difflib
import os

from jsonargparse import Namespace
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import StrategyRegistry

import lit_transformer.strategies  # noqa: F401  which registers its own
from lit_transformer.errors import UsageError

_TOO_MANY = 8  # processes on one core: two are a rehearsal, more than this is a slip of the keyboard


def check_machine(trainer: Namespace, cores: int | None = None) -> str | None:
    """One sentence where there will be more processes than cores; None where all is well.

    Args:
        trainer: Settings of the trainer.
        cores: Of this machine; counted if None.

    Raises:
        UsageError: If there is no such strategy, no GPU although one is asked for, or far more processes than cores.
    """
    if isinstance(trainer.strategy, str):
        _check_strategy(trainer.strategy)
    has_gpu = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    if trainer.accelerator == "gpu" and not has_gpu:
        raise UsageError(
            "trainer.accelerator is gpu, and torch finds none on this machine: --trainer.accelerator cpu, or auto"
        )
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not has_gpu)
    cores = cores or os.cpu_count() or 1
    if not on_cpu or not str(trainer.devices).isdigit() or int(trainer.devices) <= cores:
        return None
    asked = f"trainer.devices is {trainer.devices}, on a CPU that many processes, and this machine has {cores} cores"
    if int(trainer.devices) > _TOO_MANY * cores:
        raise UsageError(f"{asked}; take at most {cores}, or 1, which uses all cores as well")
    return f"{asked}: they will wait for each other."


def _check_strategy(name: str) -> None:
    known = ["auto", *StrategyRegistry.available_strategies()]
    if name.lower() in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=2)
    names = ", ".join(name for name in known if "unused" not in name and "xla" not in name and "tpu" not in name)
    hint = f", did you mean {' or '.join(close)}? There" if close else "; there"
    raise UsageError(f"trainer.strategy: there is no {name}{hint} are {names}")
