"""What LossSpikeRecovery says: an event and a line for each action, and the counters."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_callbacks._events import EventLog, say
from lit_callbacks._ladder import NOT_FINITE, Action, Decision, LadderState
from lit_callbacks._member import publish

_LOG_EVERY = 50  # optimizer steps
_OUT_OF_LINE = {
    "loss": "the loss is out of line",
    "gradient norm": "the gradient is out of line",
    "loss and gradient norm": "loss and gradient are out of line",
    "loss, often": "the loss is high for the third time in five steps",
}
_MANY, _ENOUGH = 0.02, 500  # share of skipped steps, and steps to take it of


class SpikeReport:
    """Counts what was done and tells everybody."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("skipped_steps", "rollbacks", "steps_lost", "nonfinite", "accepted", "steps"), 0)
        self.history: list[list[Any]] = []
        """Step and kind of the last actions."""
        self._advised = False

    def log(self, trainer: Trainer, pl_module: LightningModule, lr_factor: float, score: float) -> None:
        """Every now and then, while nothing happens."""
        if trainer.global_step % _LOG_EVERY == 0:
            values = self._values(lr_factor, score)
            publish(trainer, pl_module, trainer.global_step, values, summary=values)

    def tell(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        events: EventLog,
        action: Action,
        decision: Decision,
        event: dict[str, Any],
        state: LadderState,
    ) -> None:
        """Write one action down, say it in one line, and log the counters."""
        step, text = trainer.global_step, _sentence(action, decision, event)
        self.history = [*self.history, [step, action]][-100:]
        events.write(
            step=step,
            event=action,
            rule=_rule(decision, event),
            score=decision.verdict.score,
            anomalies=state.anomalies or None,
            weights_healthy=decision.healthy,
            lr_factor=state.lr_factor,
            **event,
            text=text,
        )
        say(f"step {step}: {text}")
        values = self._values(state.lr_factor, decision.verdict.score)
        publish(trainer, pl_module, step, values, summary=values)

    def advise(self, step: int) -> None:
        """Say once if so many steps are skipped that it cannot be faults."""
        steps, skipped = self.counts["steps"], self.counts["skipped_steps"]
        if not self._advised and steps >= _ENOUGH and skipped > _MANY * steps:
            self._advised = True
            rank_zero_warn(
                f"step {step}: {skipped} of {steps} steps have been skipped. Where data is not shuffled, or the loss "
                "has a long tail, hard batches look like faults: shuffle, or raise the thresholds, as in "
                "rule=RobustRule(k_loss=9, k_both=6, k_often=5)."
            )

    def _values(self, lr_factor: float, score: float) -> dict[str, float]:
        counts = {key: float(count) for key, count in self.counts.items() if key != "steps"}
        return {f"loss_spike/{key}": value for key, value in {**counts, "lr_factor": lr_factor, "score": score}.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters and history."""
        return {"counts": dict(self.counts), "history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.counts = dict(state["counts"])
        self.history = [list(entry) for entry in state["history"]]


def farewell(trainer: Trainer, reason: str, checkpoint: Path | None, culprit: str | None) -> str:
    """Why the run was stopped, what there is to go on from, and what to change."""
    where = "" if culprit is None else f": what is damaged is {culprit}, of which snapshots have no copy"
    stopped = f"Stopped at step {trainer.global_step}: {reason}"
    if checkpoint is None:
        return (
            f"{stopped}, and there is no good snapshot to go back to{where}. The weights in memory are not good: begin "
            "again, or go on from a checkpoint that was written before."
        )
    tips = ["lower the learning rate or warm up for longer"]
    if not trainer.gradient_clip_val:
        tips.append("set gradient_clip_val=1.0")
    if reason == NOT_FINITE:
        tips.append("use precision='bf16-mixed' or '32-true'")
    tips.append("look at the samples that events.jsonl names")
    return (
        f"{stopped}, and going back does not help. The weights are those of the last good snapshot, and are saved in "
        f"{checkpoint}. To go on from there, first {'; '.join(tips)}."
    )


def _rule(decision: Decision, event: dict[str, Any]) -> str:
    if decision.verdict.reason != NOT_FINITE:
        return decision.verdict.reason.replace(" ", "_").replace(",", "")
    return "non_finite_gradient" if event.get("first_bad_rank") is None else "non_finite_loss"


def _sentence(action: Action, decision: Decision, event: dict[str, Any]) -> str:
    what = _what(decision, event)
    if action == "skip":
        return f"{what}. The step is skipped."
    if action == "accept":
        return f"{what}, for many steps and on healthy weights. The data has changed, and this is the new normal."
    if action == "stop":
        return f"{what}. There is nothing to go back to that would help, and the run is stopped."
    further = " and more data is passed over" if decision.jump else ""
    return f"{what}. The weights go back to those of step {event['to_step']}{further}."


def _what(decision: Decision, event: dict[str, Any]) -> str:
    shown = (("loss", "loss"), ("gradient norm", "grad_norm"))
    numbers = [f"{name} {event[key]:.4g}" for name, key in shown if event.get(key) is not None]
    score = decision.verdict.score
    if math.isfinite(score):
        numbers.append(f"score {score:.1f}")
    if event.get("first_bad_rank") is not None:
        numbers.append(f"first on rank {event['first_bad_rank']}")
    if event.get("parameter"):
        numbers.append(f"first in {event['parameter']}")
    reason = decision.verdict.reason
    return f"{_OUT_OF_LINE.get(reason, reason)}: {', '.join(numbers)}"
