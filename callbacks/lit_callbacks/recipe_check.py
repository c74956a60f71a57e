"""Is the recipe a good one? Said before hours are spent on it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._member import Member
from lit_callbacks.recipe import IDS, Finding, check
from lit_callbacks.recipe.plan import Plan, labels_of
from lit_callbacks.recipe.progress import LearningProgress

_GAP = 1.2


class RecipeCheck(Member):
    """Say what is wrong with a recipe, one line each with what to do: before the first step, and while it learns.

    Before: no warm-up or an unusual one, no clipping, much dropout, BatchNorm, decay on norms or embeddings or coupled
    into Adam, post-LN without warm-up, Adam settings or fp16 that the precision does not carry, an unusual learning
    rate, broken ties of embeddings, no shuffling, validation data in the training data, labels that are all ignored,
    parameters that nobody trains. It reads trainer, optimizers and data sets, of any LightningModule.

    While it learns, once each: ``not-learning``, when after ``not_learning_after`` steps the loss is still that of
    guessing labels by their frequency; ``generalization-gap``, when the validation loss is 1.2 times the training loss;
    ``lr-zero``, when the learning rate has come to 0 before the end.

    Findings go to the console and to ``events.jsonl``; nothing is stopped.

    Args:
        not_learning_after: Optimizer steps.
        silence: Ids of findings that are not wanted.

    Raises:
        ValueError: If ``not_learning_after`` is below 1, or an id is unknown; it lists them.

    State: how the labels are distributed, the last losses, and what has been said.

    Cost: before the first step, some seconds of reading samples; on a step, the loss is kept (1 µs).

    Example:
        >>> RecipeCheck(silence=["no-clipping"]).not_learning_after
        1000
    """

    serves_shards = True
    serves_zero = True

    order = 0

    def __init__(self, not_learning_after: int = 1000, silence: list[str] | None = None) -> None:
        super().__init__()
        if not_learning_after < 1:
            raise ValueError(f"not_learning_after must be at least 1, got {not_learning_after}")
        if silence is not None and not set(silence) <= set(IDS):
            raise ValueError(f"silence must be ids of findings ({', '.join(IDS)}), got {silence!r}")
        self.not_learning_after, self.silence = not_learning_after, silence
        self.findings: list[Finding] = []
        self.events = EventLog()
        self._progress = LearningProgress()
        self._said: list[str] = list(silence or [])
        self._steps, self._last_steps = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            trial = trainer.fast_dev_run  # type: ignore[attr-defined]
            self.events = EventLog(None if trial else run_folder(trainer))
            if trainer.global_step == 0:
                self._progress, self._said = LearningProgress(), list(self.silence or [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask all rules."""
        self.findings = []
        self._steps = Plan(trainer, pl_module).steps or 0
        self._last_steps = 0.99 * self._steps - 1  # many schedules end at 0 with the run
        for finding in check(trainer, pl_module, self.silence or ()):
            self._say(trainer, finding)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; judge it once."""
        self._look_at_rates(trainer)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if {"not-learning", "generalization-gap"} <= set(self._said):
            return
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return
        accumulated = trainer.accumulate_grad_batches  # Lightning has divided the loss by it
        self._progress.add(loss.detach().reshape(()) * accumulated, labels_of(batch))
        if trainer.global_step >= self.not_learning_after and "not-learning" not in self._said:
            self._said.append("not-learning")  # asked once
            if self._progress.has_not_begun():
                loss_now, entropy = self._progress.recent_loss(), self._progress.unigram_entropy()
                self._say(
                    trainer,
                    Finding(
                        "not-learning",
                        "warning",
                        f"After {trainer.global_step} steps the loss is {loss_now:.3f}, and guessing labels by their "
                        f"frequency has {entropy:.3f}: nothing is learned.",
                        "Look at warm-up and learning rate; with post-LN, use pre-LN.",
                    ),
                )

    def _look_at_rates(self, trainer: Trainer) -> None:
        """A schedule that has come to 0 long before the end."""
        if "lr-zero" in self._said or trainer.global_step >= self._last_steps:
            return
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if rates and not any(rates):
            text = f"The learning rate is 0 from step {trainer.global_step} on, and the run has {self._steps}."
            self._say(trainer, Finding("lr-zero", "error", text, "Make the schedule as long as the run."))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the training loss, where both are known."""
        val = trainer.callback_metrics.get("val/loss", trainer.callback_metrics.get("val_loss"))
        if trainer.sanity_checking or val is None or "generalization-gap" in self._said or not self._progress.losses:
            return
        train = self._progress.recent_loss()
        if float(val) > _GAP * train > 0:
            text = f"The validation loss is {float(val):.3f}, the training loss {train:.3f}."
            self._say(
                trainer, Finding("generalization-gap", "note", text, "More data, dropout or decay, or an earlier stop.")
            )

    def _say(self, trainer: Trainer, finding: Finding) -> None:
        self.findings.append(finding)
        self._said.append(finding.id)
        say(str(finding))
        self.events.write(step=trainer.global_step, event="recipe", **vars(finding))

    def state_dict(self) -> dict[str, Any]:
        """What has been seen and said."""
        return {"progress": self._progress.state_dict(), "said": list(self._said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; what is silenced now stays so."""
        self._progress.load_state_dict(state_dict["progress"])
        self._said = sorted({*state_dict["said"], *(self.silence or [])})
