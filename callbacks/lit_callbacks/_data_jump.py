"""How far is training into its data, and how does it pass over more of it?"""

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

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


def jump(trainer: Trainer, n: int) -> str:
    """Pass over the next ``n`` units of :func:`data_place`, after a window's last batch. All ranks must do so together.

    Anybody else's loader is drawn from and what it gives is dropped; its last batch is left, so that the epoch ends as
    usual. Batch indices and progress count what was dropped.

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
    left -= left % trainer.accumulate_grad_batches
    dropped = 0
    while dropped < left and not fetcher.done:
        next(fetcher)
        dropped += 1
    progress = loop.batch_progress
    for kind in ("ready", "started", "processed", "completed"):
        for span in (progress.current, progress.total):
            setattr(span, kind, getattr(span, kind) + dropped)
    return f"{dropped} batches"


def _movable(trainer: Trainer) -> _Movable | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, _Movable) else None
