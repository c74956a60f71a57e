"""Tokens that are left out at random, others each time: word dropout (Iyyer et al. 2015, section 3)."""

import numpy as np
import torch

from lit_transformer.data.loader import Batch
from lit_transformer.data.order import Ids, noise
from lit_transformer.errors import UsageError


def drop_tokens(batch: Batch, draws: Ids, rate: float, seed: int) -> Batch:
    """Hide some of the real tokens from attention and pooling; the first of a text stays.

    Args:
        batch: With ``attention_mask`` of ``(B, T)``.
        draws: A number for each text, ``(B,)``; which tokens go is a function of it, of the place and of ``seed``.
        rate: Share of the tokens to hide.
        seed: Of the choice.

    Cost: some 10 nanoseconds a token; nothing at a rate of 0.

    Example:
        >>> mask = drop_tokens({"attention_mask": torch.ones(1, 1000)}, np.array([7]), 0.3, seed=0)["attention_mask"]
        >>> 0.65 < mask.mean().item() < 0.75
        True
    """
    if rate == 0:
        return batch
    mask = batch["attention_mask"]
    kept = noise(seed, draws, mask.size(1)) >> np.uint64(40) >= np.uint64(round(rate * 2**24))
    kept[:, 0] = True
    return batch | {"attention_mask": mask * torch.from_numpy(kept)}


def check_rate(rate: float) -> None:
    """Refuse what is no rate."""
    if not 0 <= rate < 1:
        raise UsageError(f"token_dropout must be at least 0 and below 1, got {rate}")
