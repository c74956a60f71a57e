"""Rules about the data."""

import copy
import hashlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from lit_callbacks.recipe.finding import rule
from lit_callbacks.recipe.plan import Plan, labels_of

Found = Iterator[tuple[str, str]]

_SAMPLES = 200  # of the validation data, and of labels
_SECONDS = 2.0  # of reading; where a sample is decoded, that is some hundred of them
_IGNORED = -100


@rule("shuffle-off", "warning")
def shuffle_off(plan: Plan) -> Found:
    """Training sees its samples in the order in which they are stored."""
    for loader in plan.train_loaders:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            continue
        sampler: Any = getattr(loader, "sampler", None)
        stored = isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False
        if stored and plan.trainer.num_training_batches > 1 and not plan.trainer.overfit_batches:  # type: ignore[attr-defined]
            yield "The training loader does not shuffle.", "Set DataLoader(shuffle=True)."
            return


@rule("validation-in-training", "error")
def validation_in_training(plan: Plan) -> Found:
    """Validation samples that are trained on: the validation loss says nothing then."""
    if plan.trainer.overfit_batches:  # type: ignore[attr-defined]
        return
    trained, validated = (_datasets(loaders) for loaders in (plan.train_loaders, plan.val_loaders))
    for val in validated:
        for train in trained:
            shared = _shared(train, val)
            if shared:
                yield f"{shared} of the validation data are in the training data.", "Split before anything else."
                return


@rule("labels-ignored", "error")
def labels_ignored(plan: Plan) -> Found:
    """Not one label of a sample counts."""
    for dataset in _datasets(plan.train_loaders):
        samples = list(itertools.islice(_samples(dataset), 20))
        labels = [labels_of(sample) for sample in samples]
        known = [label for label in labels if label is not None and not label.is_floating_point()]
        if known and all(bool((label == _IGNORED).all()) for label in known):
            text = f"All labels of {len(known)} samples are {_IGNORED}, which is ignored."
            yield text, "Look at how labels are masked."
            return


def _datasets(loaders: list[Any]) -> list[Any]:
    """Data sets that can be indexed by number, of loaders that have one."""
    found = [getattr(loader, "dataset", None) for loader in loaders]
    readable = [d for d in found if hasattr(d, "__getitem__") and hasattr(d, "__len__")]
    own = Dataset.__getitem__  # which only raises
    return [d for d in readable if getattr(type(d), "__getitem__", None) is not own]


def _own(dataset: Any) -> Any:
    """A shallow copy to read from: loader workers must not inherit a file that is opened at the first sample."""
    own = copy.copy(dataset)
    if isinstance(own, Subset):
        own.dataset = _own(own.dataset)
    return own


def _samples(dataset: Any) -> Iterator[Any]:
    """Some samples, spread over a data set, as many as can be read in two seconds."""
    own, length, until = _own(dataset), len(dataset), time.monotonic() + _SECONDS
    for i in range(0, length, max(1, length // _SAMPLES)):
        yield own[i]
        if time.monotonic() > until:
            return


def _shared(train: Any, val: Any) -> str:
    if train is val:
        return "All"
    if isinstance(train, Subset) and isinstance(val, Subset) and train.dataset is val.dataset:
        both = set(train.indices) & set(val.indices)
        return f"{len(both)} of {len(val.indices)} samples" if both else ""
    if isinstance(val, Subset) and val.dataset is train:
        return "All"
    wanted = {_digest(sample) for sample in _samples(val)}
    own, found, until = _own(train), set(), time.monotonic() + _SECONDS
    for i in range(len(train)):
        found |= {_digest(own[i])} & wanted
        if time.monotonic() > until:
            break
    # Texts repeat themselves: some of the shortest are in every split.
    return f"At least {len(found)} of {len(wanted)} samples" if len(found) > max(1, len(wanted) / 20) else ""


def _digest(sample: Any) -> bytes:
    digest = hashlib.sha256()
    for leaf in tree_leaves(sample):
        digest.update(repr(leaf.tolist() if isinstance(leaf, Tensor) else leaf).encode())
    return digest.digest()
