"""How far is training into its data, and how does it pass over more of it?"""

import math
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_callbacks.protocols import CanSkip, HasPosition


@runtime_checkable
class _Movable(HasPosition, CanSkip, Protocol):
    """A data module that knows its position and can move it."""


def data_place(trainer: Trainer) -> int:
    """Samples consumed over all ranks where the data module says so, else batches drawn on this rank."""
    data = _movable(trainer)
    if data is not None:
        return data.position()
    drawn: int = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return drawn


def may_jump(trainer: Trainer, batch_idx: int) -> bool:
    """Whether now is the time: at the end of an accumulation window after which no validation is due."""
    check = trainer.val_check_batch
    validates = check not in (None, math.inf) and (batch_idx + 1) % int(check) == 0
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not validates and not trainer.is_last_batch


def jump(trainer: Trainer, n: int) -> str:
    """Pass over the next ``n`` units of :func:`data_place`. All ranks must do so together, where :func:`may_jump`.

    Anybody else's loader is drawn from and what it gives is dropped; its last batch is left, so that the epoch ends as
    usual, and so is that after which validation is due. Batch indices and progress count what was dropped.

    Returns:
        What was passed over, in words.
    """
    data = _movable(trainer)
    if data is not None:
        data.skip(n)
        return f"{n} samples"
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    if type(fetcher).__name__ != "_PrefetchDataFetcher":
        return "nothing: training_step draws its own batches"
    left = n if fetcher.length is None else min(n, fetcher.length - fetcher.fetched - 1)
    if trainer.val_check_batch not in (None, math.inf):  # the next validation must not be passed over
        check = int(trainer.val_check_batch)
        left = min(left, check - 1 - (loop.batch_progress.current.ready % check))
    left -= max(0, left) % trainer.accumulate_grad_batches
    dropped = 0
    while dropped < left:
        batch = next(fetcher)
        if fetcher.done:  # the last batch ends the epoch as usual; only now is it known to be the last
            fetcher.batches.insert(0, batch)
            fetcher.done = False
            break
        dropped += 1
    progress = loop.batch_progress
    for kind in ("ready", "started", "processed", "completed"):
        for span in (progress.current, progress.total):
            setattr(span, kind, getattr(span, kind) + dropped)
    return f"{dropped} batches"


def draws_here(trainer: Trainer) -> bool:
    """Whether the training data may be drawn from the random numbers of this process, batch by batch."""
    if _movable(trainer) is not None:
        return False  # its order is a function of the position
    loader: object = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        return True
    return loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset)


def _movable(trainer: Trainer) -> _Movable | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, _Movable) else None
