"""Is it the weights? A batch from before tells."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_callbacks import _ranks
from lit_callbacks._replay import of_an_earlier_step, training_loss, without_trace
from lit_callbacks._window import MicroBatch
from lit_callbacks.functional import tensor_norms


class ProbeBatch(NamedTuple):
    """A batch, and the loss it had."""

    micro_batch: MicroBatch
    loss: Tensor


def copy_of(micro_batch: MicroBatch) -> MicroBatch:
    """The same batch in tensors of its own: some training steps write to theirs, and some loaders use them again."""
    return micro_batch._replace(batch=tree_map_only(Tensor, torch.clone, micro_batch.batch))


def rise(trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch | None) -> float | None:
    """Nats by which the batch costs more now than it did, with the same dropout, on average over ranks.

    Returns:
        None where some rank cannot tell: it has no batch, or the training step cannot be run again.
    """
    device = trainer.strategy.root_device
    change, failed = torch.zeros((), device=device), probe is None
    token = of_an_earlier_step.set(True)
    try:
        if probe is not None:
            with torch.no_grad(), without_trace(trainer, pl_module):
                change = training_loss(trainer, pl_module, probe.micro_batch).float().reshape(()) - probe.loss
    except Exception:
        failed = True
    finally:
        of_an_earlier_step.reset(token)
    ranks = _ranks.rows_of_ranks(trainer, torch.stack([change, torch.full_like(change, failed)])).tolist()
    if any(failed for _, failed in ranks):
        return None
    return math.fsum(change for change, _ in ranks) / len(ranks)


def any_non_finite(trainer: Trainer, live: Mapping[str, Tensor]) -> Tensor:
    """Above 0 if some floating-point tensor on some rank is not finite, or so large that its norm is not.

    Shape ``(1,)``, on the device: whoever reads it waits.
    """
    norms = tensor_norms([t for t in live.values() if t.is_floating_point() and t.element_size() > 1])
    bad = (~norms.isfinite()).any().float().reshape(1).to(trainer.strategy.root_device)
    return _ranks.largest(trainer, bad)
