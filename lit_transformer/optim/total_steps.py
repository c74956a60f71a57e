"""How many optimizer steps a run has, known before its first batch is drawn."""

import math

from lightning.pytorch import Trainer

from lit_transformer.batch_geometry import data_parallel_size
from lit_transformer.errors import UsageError


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, at this number of devices and this accumulation.

    ``max_steps`` and ``max_epochs`` both count, whichever ends first. Batches per epoch come from the data module's
    ``batches_per_epoch(world_size)``, else from the length of a loader made once and thrown away. Never from
    ``trainer.estimated_stepping_batches``, which sets up the loaders of the fit loop and so loses their position when
    a run is resumed (Lightning issue 20550).

    Raises:
        UsageError: If neither bounds the run.
    """
    bounds = []
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches = _batches_per_epoch(trainer)
        if batches is not None:
            # The last window of an epoch may be short, but it is stepped all the same.
            bounds.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if not bounds:
        raise UsageError(
            "the schedule needs to know how long the run is, and neither trainer.max_steps nor trainer.max_epochs with "
            "a loader of known length says so; set trainer.max_steps"
        )
    return max(1, min(bounds))


def _batches_per_epoch(trainer: Trainer) -> int | None:
    count = getattr(trainer.datamodule, "batches_per_epoch", None)  # type: ignore[attr-defined]
    if callable(count):
        batches = int(count(data_parallel_size(trainer)))
    else:
        source = trainer.fit_loop._data_source
        loader = source.dataloader() if source.is_defined() else None
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None
    limit = trainer.limit_train_batches
    if isinstance(limit, float):
        return int(batches * limit)
    return min(batches, int(limit))
