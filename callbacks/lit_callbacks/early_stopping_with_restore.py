"""Has it stopped getting better? Then stop, and go back to where it was best."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._member import Member
from lit_callbacks._ranks import tensor_parallel
from lit_callbacks._shards import set_whole_state, whole_state


class EarlyStoppingWithRestore(Member):
    """Stop when a metric of the validation has not got better for some time, and put the best weights back.

    Lightning's ``EarlyStopping`` leaves the module with its last weights, which are ``patience`` validations past the
    best. Here, when fit has ended, by this callback or otherwise, the module in memory has the weights of the best
    validation. Checkpoints are not touched: the last one is the end of training, to go on from.

    A value that is not finite is no better one. All ranks go by the value of rank zero.

    Args:
        monitor: The logged metric.
        patience: Validations without a better value that are waited for.
        mode: Whether low (``min``) or high (``max``) values are good.
        min_delta: What a value must be better by.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: After the first validation, if the metric is not logged; it lists those that are.

    State: the best value, step and weights, and for how long there was no better one. The weights are in every
    checkpoint: a third more with Adam.

    Cost: one copy of the weights in host memory, made at each better validation; of sharded weights, on the first rank,
    which collects them.

    Example:
        >>> EarlyStoppingWithRestore(monitor="val/accuracy", mode="max").patience
        10
    """

    order = 2
    serves_shards = True
    serves_flat_shards = False

    def __init__(
        self, monitor: str = "val/loss", patience: int = 10, mode: str = "min", min_delta: float = 0.0
    ) -> None:
        super().__init__()
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode!r}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, got {min_delta}")
        self.monitor, self.patience, self.mode, self.min_delta = monitor, patience, mode, min_delta
        self.events = EventLog()
        self._forget()

    def _forget(self) -> None:
        self.best_value, self.best_step = math.nan, -1
        self._waited = 0
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if tensor_parallel(trainer)[1] > 1:
                raise SetupError(
                    "EarlyStoppingWithRestore does not serve tensor parallelism yet: the weights it keeps have their "
                    "rows in the order of this group of devices. Leave it out, or take strategy fsdp2."
                )
            self.events = EventLog(run_folder(trainer))
            if trainer.global_step == 0:
                self._forget()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Better? Keep the weights. Waited long enough? Stop."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise SetupError(
                f"EarlyStoppingWithRestore(monitor={self.monitor!r}) found no such metric after a validation; logged "
                f"are {logged}."
            )
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        if self._is_better(value):
            self.best_value, self.best_step, self._waited = value, trainer.global_step, 0
            self._weights = whole_state(pl_module)
            return
        self._waited += 1
        if self._waited >= self.patience:
            trainer.should_stop = True
            text = f"{self.monitor} has not got better than {self.best_value:.6g} since step {self.best_step}"
            say(f"step {trainer.global_step}: {text}: training stops.")
            self.events.write(
                step=trainer.global_step, event="early_stop", best=self.best_value, best_step=self.best_step
            )

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if math.isnan(self.best_value):
            return True
        gain = self.best_value - value if self.mode == "min" else value - self.best_value
        return gain > self.min_delta

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back, after everything has been saved."""
        if self.best_step not in (-1, trainer.global_step):
            set_whole_state(pl_module, self._weights)
            say(f"The module has the weights of step {self.best_step}, where {self.monitor} was {self.best_value:.6g}.")

    def state_dict(self) -> dict[str, Any]:
        """Everything, the best weights too."""
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "waited": self._waited,
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
        self._waited = state_dict["waited"]
        self._weights = {name: value.cpu() for name, value in state_dict["weights"].items()}
