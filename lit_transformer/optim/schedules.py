"""Learning-rate schedules: functions of the optimizer step that scale the optimizer's ``lr``."""

import math
from dataclasses import dataclass


class Schedule:
    """What the learning rate is multiplied by at each optimizer step."""

    def factor(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``, counted from 0, in a run of ``total_steps`` updates."""
        raise NotImplementedError


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up from near zero, then half a cosine down to a floor (Loshchilov and Hutter 2017).

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.

    Raises:
        ValueError: If ``warmup`` is negative or does not fit into the run, or ``min_lr_ratio`` is outside 0 to 1.

    Example:
        >>> schedule = WarmupCosine(warmup=10, min_lr_ratio=0.1)
        >>> [round(schedule.factor(step, 110), 3) for step in (0, 4, 9, 10, 60, 110)]
        [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]
    """

    warmup: float = 0.02
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a share below 1 or a whole number of updates, got {self.warmup}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")

    def warmup_steps(self, total_steps: int) -> int:
        """Warm-up in updates."""
        steps = math.ceil(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        if steps > total_steps:
            raise ValueError(
                f"a warm-up of {steps} updates is longer than the run of {total_steps}; "
                f"shorten warmup (1 to 10 % of a run is usual) or train for longer"
            )
        return steps

    def factor(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``; past the end it stays at the floor."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
