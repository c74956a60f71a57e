"""What a learning-rate schedule is: a function of the optimizer step that scales the optimizer's ``lr``."""

import math
from dataclasses import dataclass


class Schedule:
    """What the learning rate is multiplied by at each optimizer step."""

    def multiplier(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``, counted from 0, in a run of ``total_steps`` updates."""
        raise NotImplementedError

    def turning_points(self, total_steps: int) -> dict[str, int]:
        """Updates at which the curve changes its kind, by name."""
        return {}


def as_steps(value: float, total_steps: int) -> int:
    """A share of the run below 1, or a number of updates, in updates.

    Example:
        >>> as_steps(0.05, 1210), as_steps(7, 1210)
        (61, 7)
    """
    return math.ceil(value * total_steps) if value < 1 else int(value)


def check_steps(name: str, value: float) -> None:
    """Refuse what is neither a share nor a number of updates.

    Raises:
        ValueError: If it is negative, or above 1 and not whole.
    """
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    if value > 1 and value != int(value):
        raise ValueError(f"{name} must be a share below 1 or a whole number of updates, got {value}")


@dataclass(frozen=True)
class WarmupConstant(Schedule):
    """Linear warm-up from near zero to the full learning rate, which then stays.

    Update ``i`` of ``n`` warm-up updates has ``(i + 1) / n`` of it: the first one already moves the weights.

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.

    Raises:
        ValueError: If an argument is out of range, or, once the length of the run is known, does not fit into it.

    Example:
        >>> [WarmupConstant(warmup=4).multiplier(step, 100) for step in (0, 1, 3, 50)]
        [0.25, 0.5, 1.0, 1.0]
    """

    warmup: float = 0.02

    def __post_init__(self) -> None:
        check_steps("warmup", self.warmup)

    def warmup_steps(self, total_steps: int) -> int:
        """Warm-up in updates."""
        steps = as_steps(self.warmup, total_steps)
        if steps > total_steps:
            raise ValueError(
                f"a warm-up of {steps} updates is longer than the run of {total_steps}; "
                "shorten the schedule's warmup (model.init_args.schedule.init_args.warmup; 1 to 10 % of a run is "
                "usual) or train for longer"
            )
        return steps

    def multiplier(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``; past the end the last one stays."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        return self._after(min(step, total_steps) - warmup, total_steps - warmup, warmup)

    def turning_points(self, total_steps: int) -> dict[str, int]:
        """Where the warm-up ends."""
        warmup = self.warmup_steps(total_steps)
        return {"end of warm-up": warmup} if warmup else {}

    def _after(self, step: int, length: int, warmup: int) -> float:
        """The multiplier ``step`` updates after the warm-up, of ``length``."""
        return 1.0
