"""The schedules, each a curve after the warm-up."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lit_transformer.optim.schedule import WarmupConstant, as_steps, check_steps


@dataclass(frozen=True)
class _Decay(WarmupConstant):
    """From the full learning rate to a floor, by a share that falls from 1 to 0."""

    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be between 0 and 1, got {self.min_lr_ratio}")

    def _after(self, step: int, length: int, warmup: int) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * self._share(step / max(1, length))

    def _share(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class WarmupLinear(_Decay):
    """Warm-up, then a straight line down to the floor (BERT, Devlin et al. 2019).

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.

    Raises:
        ValueError: If an argument is out of range or does not fit into the run.

    Example:
        >>> [round(WarmupLinear(warmup=10, min_lr_ratio=0.0).multiplier(step, 110), 3) for step in (0, 10, 60, 110)]
        [0.1, 1.0, 0.5, 0.0]
    """

    def _share(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class WarmupCosine(_Decay):
    """Warm-up, then half a cosine down to the floor (Loshchilov and Hutter 2017). The default of language models.

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.

    Raises:
        ValueError: If an argument is out of range or does not fit into the run.

    Example:
        >>> schedule = WarmupCosine(warmup=10, min_lr_ratio=0.1)
        >>> [round(schedule.multiplier(step, 110), 3) for step in (0, 4, 9, 10, 60, 110)]
        [0.1, 0.5, 1.0, 1.0, 0.55, 0.1]
    """

    def _share(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupCosineRestarts(_Decay):
    """Warm-up, then several half cosines, each from the full learning rate to the floor (SGDR, the same paper).

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.
        cycles: How many, of equal length.

    Raises:
        ValueError: If an argument is out of range or does not fit into the run.

    Example:
        >>> schedule = WarmupCosineRestarts(warmup=0, min_lr_ratio=0.0, cycles=2)
        >>> [round(schedule.multiplier(step, 100), 3) for step in (0, 25, 49, 50, 75, 100)]
        [1.0, 0.5, 0.001, 1.0, 0.5, 0.0]
    """

    cycles: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles}")

    def turning_points(self, total_steps: int) -> dict[str, int]:
        """Where the warm-up ends, and each restart."""
        warmup = self.warmup_steps(total_steps)
        starts = [warmup + math.ceil(i * (total_steps - warmup) / self.cycles) for i in range(1, self.cycles)]
        return super().turning_points(total_steps) | {f"restart {i + 1}": step for i, step in enumerate(starts)}

    def _share(self, progress: float) -> float:
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1.0)))


@dataclass(frozen=True)
class WarmupPolynomial(_Decay):
    """Warm-up, then a power of what is left of the run.

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.
        power: 1 is a straight line.

    Raises:
        ValueError: If an argument is out of range or does not fit into the run.

    Example:
        >>> round(WarmupPolynomial(warmup=0, min_lr_ratio=0.0, power=2.0).multiplier(50, 100), 3)
        0.25
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    def _share(self, progress: float) -> float:
        return float((1 - progress) ** self.power)


@dataclass(frozen=True)
class WarmupStableDecay(_Decay):
    """Warm-up, the full learning rate for most of the run, and a short way down (Hu et al. 2024, MiniCPM).

    A run can be made longer without having decided its length before: go on from a checkpoint of before the decay.

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        min_lr_ratio: The floor, as a share of the full learning rate.
        decay: Updates of the way down; below 1, the share of the run.
        shape: Of the way down: a straight line, half a cosine, or one minus the square root (Hägele et al. 2024).

    Raises:
        ValueError: If an argument is out of range, or warm-up and decay do not fit into the run.

    Example:
        >>> schedule = WarmupStableDecay(warmup=10, min_lr_ratio=0.0, decay=20, shape="linear")
        >>> [schedule.multiplier(step, 100) for step in (4, 10, 80, 90, 100)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    decay: float = 0.1
    shape: Literal["linear", "cosine", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("decay", self.decay)
        if self.shape not in _SHAPES:
            raise ValueError(f"shape must be one of {', '.join(_SHAPES)}, got {self.shape!r}")

    def decay_steps(self, total_steps: int) -> int:
        """The way down in updates."""
        steps, warmup = as_steps(self.decay, total_steps), self.warmup_steps(total_steps)
        if warmup + steps > total_steps:
            raise ValueError(
                f"a warm-up of {warmup} updates and a decay of {steps} are longer than the run of {total_steps}; "
                "shorten one of them or train for longer"
            )
        return steps

    def multiplier(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``; past the end it stays at the floor."""
        decay = self.decay_steps(total_steps)
        if step < total_steps - decay or not decay:
            return super().multiplier(min(step, self.warmup_steps(total_steps)), total_steps)
        share = _SHAPES[self.shape](min(1.0, (step - total_steps + decay) / decay))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * share

    def turning_points(self, total_steps: int) -> dict[str, int]:
        """Where the warm-up ends and the decay begins."""
        return super().turning_points(total_steps) | {"start of decay": total_steps - self.decay_steps(total_steps)}

    def _share(self, progress: float) -> float:
        return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class WarmupInverseSqrt(WarmupConstant):
    """Warm-up, then one over the square root of the step, for runs without an end (T5, Raffel et al. 2020).

    Args:
        warmup: Updates until the full learning rate, at least 1; below 1, the share of the run. Four times as many
            updates halve it.

    Raises:
        ValueError: If ``warmup`` is 0, out of range, or does not fit into the run.

    Example:
        >>> [WarmupInverseSqrt(warmup=100).multiplier(step, 10_000) for step in (49, 100, 400)]
        [0.5, 1.0, 0.5]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup == 0:
            raise ValueError("warmup must be above 0: the curve is measured in it")

    def multiplier(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``, without an end."""
        warmup = self.warmup_steps(total_steps)
        return (step + 1) / warmup if step < warmup else math.sqrt(warmup / step)


@dataclass(frozen=True)
class Noam(WarmupConstant):
    """The schedule of "Attention Is All You Need": ``d_model^-0.5 · min(s^-0.5, s · warmup^-1.5)``, ``s`` from 1.

    It is the learning rate itself, so the optimizer's ``lr`` is 1.0, or a factor of it. Its highest value,
    ``(d_model · warmup)^-0.5``, is reached in update ``warmup``.

    Args:
        warmup: As in the paper, 4000; below 1, the share of the run.
        d_model: Width of the model.

    Raises:
        ValueError: If an argument is out of range, ``warmup`` is 0, or it does not fit into the run.

    Example:
        >>> round(Noam(warmup=4000, d_model=512).multiplier(3999, 100_000), 9) == round((512 * 4000) ** -0.5, 9)
        True
    """

    warmup: float = 4000
    d_model: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup == 0:
            raise ValueError("warmup must be above 0: the curve is measured in it")
        if self.d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {self.d_model}")

    def multiplier(self, step: int, total_steps: int) -> float:
        """The multiplier of update ``step``, without an end."""
        s, warmup = step + 1, self.warmup_steps(total_steps)
        return float(self.d_model**-0.5 * min(s**-0.5, s * warmup**-1.5))
