"""Where training stands in its loaders, for loaders that do not know it themselves."""

from typing import Any

import torch
from lightning.pytorch import Trainer


def loaders(trainer: Trainer) -> list[Any]:
    """The training loaders."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def loader_generators(trainer: Trainer) -> list[torch.Generator]:
    """The generators that the training loaders and their samplers own, each once, always in the same order."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders(trainer):
        for owner in (loader, *samplers(loader)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def samplers(loader: Any) -> list[Any]:
    """What decides the order of a loader, from the outside in."""
    found: list[Any] = []
    for name in ("sampler", "batch_sampler"):
        owner = getattr(loader, name, None)
        while owner is not None and owner not in found:
            found.append(owner)
            owner = getattr(owner, "sampler", None)
    return found


def set_epoch(trainer: Trainer, epoch: int) -> None:
    """Tell the samplers the epoch before the iterator is made.

    Lightning 2.6.6 tells them after it has made the first iterator of a fit: with workers, a resumed run then draws the
    order of epoch 0 (issue 21938).
    """
    for loader in loaders(trainer):
        for sampler in samplers(loader):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)


def knows_its_position(loader: Any) -> bool:
    """Whether Lightning saves and restores the position of a loader."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


_FINISHED = "_iterator_finished"  # of torchdata's StatefulDataLoader


def finish_epoch(states: list[dict[str, Any]]) -> None:
    """Let loaders of which the last batch was taken begin a new epoch.

    A ``StatefulDataLoader`` whose iterator was not asked for one batch more is saved as one that still has to end: when
    it goes on, it has no batch, and the epoch is lost.

    Args:
        states: Of the loaders, changed in place.
    """
    for state in states:
        if _FINISHED in state:
            state[_FINISHED] = True


def restore_parts(trainer: Trainer) -> None:
    """Restore samplers and data sets inside of loaders now, and not when the iterator is made.

    A ``StatefulDataLoader`` would make two, and draw from the random numbers for both.
    """
    for loader in loaders(trainer):
        if knows_its_position(loader):
            loader.state_dict()


def pass_over(trainer: Trainer, n: int) -> None:
    """Draw the first ``n`` batches of the iterator that was just made, and drop them.

    Cost: loading them.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    fetched = fetcher.fetched
    for _ in range(n):
        next(fetcher)
    fetcher.fetched = fetched  # Lightning adds the batches of before the resume by itself
