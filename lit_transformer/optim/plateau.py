"""The one schedule that looks at a metric."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_transformer.optim.schedule import WarmupConstant


@dataclass(frozen=True)
class WarmupPlateau(WarmupConstant):
    """Warm-up, then a lower learning rate whenever a metric of the validation stops getting better.

    It is torch's ``ReduceLROnPlateau``, asked once after each validation that follows the warm-up. Its state is in the
    checkpoint.

    Args:
        warmup: Updates until the full learning rate; below 1, the share of the run.
        factor: What the learning rate is multiplied by.
        patience: Validations without a better value that are waited for.
        min_lr: The floor of the highest learning rate of all groups.
        monitor: The logged metric.
        mode: Whether low or high values of it are good.

    Raises:
        ValueError: If an argument is out of range or does not fit into the run.

    Example:
        >>> plateau = WarmupPlateau(warmup=0, patience=0).start(peak_lr=0.1)
        >>> [plateau.observe(loss) for loss in (2.0, 1.0, 1.0, 0.5)]
        [1.0, 1.0, 0.5, 0.5]
    """

    factor: float = 0.5
    patience: int = 5
    min_lr: float = 1e-7
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be above 0 and below 1, got {self.factor}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")
        if self.min_lr < 0:
            raise ValueError(f"min_lr must be at least 0, got {self.min_lr}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {self.mode!r}")

    def start(self, peak_lr: float) -> "Plateau":
        """What observes a run whose highest learning rate is ``peak_lr``."""
        return Plateau(self, peak_lr)


class Plateau:
    """The multiplier so far, and what it depends on: :meth:`state_dict` is plain data."""

    def __init__(self, schedule: WarmupPlateau, peak_lr: float) -> None:
        self.schedule, self.peak_lr = schedule, peak_lr
        # Torch's scheduler writes the learning rate of an optimizer; it gets one of its own, so that the warm-up and
        # what recovery does to the learning rate stay apart.
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak_lr)
        self._judge = ReduceLROnPlateau(
            self._optimizer, schedule.mode, schedule.factor, schedule.patience, min_lr=min(schedule.min_lr, peak_lr)
        )

    @property
    def scale(self) -> float:
        """What the learning rate is multiplied by now."""
        return float(self._optimizer.param_groups[0]["lr"]) / self.peak_lr

    def observe(self, value: float) -> float:
        """The multiplier after another validation. A value that is not finite counts as no better one."""
        worst = math.inf if self.schedule.mode == "min" else -math.inf
        self._judge.step(value if math.isfinite(value) else worst)
        return self.scale

    def state_dict(self) -> dict[str, Any]:
        """Everything it has learned from the metric."""
        names = ("best", "num_bad_epochs", "last_epoch")
        return {"scale": self.scale, **{name: getattr(self._judge, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, also with another peak."""
        values = dict(state)
        self._optimizer.param_groups[0]["lr"] = values.pop("scale") * self.peak_lr
        vars(self._judge).update(values)
