"""How many tokens an optimizer step sees, and from what."""

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lit_transformer.errors import UsageError


@dataclass(frozen=True)
class BatchGeometry:
    """Factors of the effective batch.

    Example:
        >>> print(BatchGeometry(devices=2, tokens_per_batch=4096, accumulation=3, target=20_000).describe())
        Effective batch: 24,576 tokens = 2 devices x 4,096 tokens x 3 accumulated batches (target 20,000).
    """

    devices: int
    tokens_per_batch: int
    accumulation: int
    target: int

    def describe(self) -> str:
        """The product, spelled out."""
        total = self.devices * self.tokens_per_batch * self.accumulation
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        batches = f"{self.accumulation} accumulated batch{'es' if self.accumulation > 1 else ''}"
        return (
            f"Effective batch: {total:,} tokens = {devices} x {self.tokens_per_batch:,} tokens x {batches} "
            f"(target {self.target:,})."
        )


def data_parallel_size(trainer: Trainer) -> int:
    """How many parts a batch has: devices, or groups of devices that share one under tensor parallelism."""
    return int((trainer.distributed_sampler_kwargs or {"num_replicas": trainer.world_size})["num_replicas"])


def measure(trainer: Trainer, target: int) -> BatchGeometry:
    """The accumulation that reaches ``target`` tokens a step on this trainer's devices.

    Raises:
        UsageError: If the data module does not say how many tokens a batch holds, or accumulation is also set by hand.
    """
    tokens = getattr(trainer.datamodule, "tokens_per_batch", None)  # type: ignore[attr-defined]
    if tokens is None:
        raise UsageError(
            "target_batch_tokens needs a data module with tokens_per_batch, and this one has none; set "
            "trainer.accumulate_grad_batches instead"
        )
    devices = data_parallel_size(trainer)
    accumulation = math.ceil(target / (tokens * devices))
    if trainer.accumulate_grad_batches not in (1, accumulation):
        raise UsageError(
            f"target_batch_tokens={target} derives an accumulation of {accumulation}, but "
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is set as well; leave one of them out"
        )
    return BatchGeometry(devices, tokens, accumulation, target)
