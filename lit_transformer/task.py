"""The steps that all tasks share: from logits and targets to loss, metrics and predictions."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from lit_transformer.distillation import Distillation
from lit_transformer.errors import UsageError
from lit_transformer.objectives import ClassObjective, Objective, TokenObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.recipe import LitRecipe

Batch = dict[str, Tensor]


class LitTask(LitRecipe):
    """A model with an objective; a subclass makes logits of a batch.

    A batch may have ``sample_weights``, ``(B,)``: how much each sample counts in training.

    Logs:
        train/loss: what is minimised, with label smoothing and distillation if there are any.
        train/task_loss, train/distillation: its two parts, when there is a teacher.
        val/…, test/…: the objective's metrics.

    Args:
        objective: Loss and metrics.
        optimizer: See :class:`~lit_transformer.recipe.LitRecipe`.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.
        distillation: A teacher, and how much it counts.

    Raises:
        ValueError: If there is a teacher for an objective with several labels a sample.
        UsageError: At the start of fit, if the teacher cannot be loaded, or has other classes than the student.
    """

    kind: str  # what is predicted: causal_lm, masked_lm, classification or seq2seq
    labels: list[str] | None = None  # the names of the classes, where there are any

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, target_batch_tokens, param_groups)
        self.objective = objective
        self.distillation = Distillation(**distillation) if isinstance(distillation, Mapping) else distillation
        if self.distillation is not None and isinstance(objective, ClassObjective) and objective.multi_label:
            raise ValueError("distillation is for one class a sample, and multi_label is set; leave one of them out")
        taught = None if self.distillation is None else asdict(self.distillation)
        said = {"label_smoothing": objective.label_smoothing, "z_loss": objective.z_loss}
        self.save_hyperparameters({**said, "distillation": taught})
        # In a tuple, which torch does not look into: no part of the student's weights, checkpoints or summary.
        self._teacher: tuple[LitTask, ...] = ()

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """What the model says of a batch."""

    def targets(self, batch: Batch) -> Tensor:
        """What it should say."""
        return batch["targets"]

    def setup(self, stage: str) -> None:
        """Load the teacher; tell the objective what a token stands for."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(self.objective, TokenObjective) and self.kind == "causal_lm":
            self.objective.token_bytes = getattr(data, "token_bytes", None)
        if stage == "fit" and self.distillation is not None and not self._teacher:
            from lit_transformer.tasks.teacher import load_teacher  # which knows all tasks

            self._teacher = (load_teacher(self.distillation.teacher, self.kind).requires_grad_(False).eval(),)

    def on_fit_start(self) -> None:
        """Take the teacher along to the device, and begin with metrics that can be added to."""
        for metric in self.modules():
            # `validate` leaves tensors of inference mode, in which a fit does not validate (Lightning 2.6).
            if isinstance(metric, Metric) and any(map(_of_inference, metric.metric_state.values())):
                metric.reset()
        for teacher in self._teacher:
            teacher.to(self.device)

    def training_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch by its labels, with label smoothing, in nats."""
        return self.objective.loss(self.logits(batch), self.targets(batch), batch.get("sample_weights"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, logged."""
        if self.distillation is None:
            loss = self.training_loss(batch)
        else:
            logits, targets = self.logits(batch), self.targets(batch)
            task_loss = self.objective.loss(logits, targets, batch.get("sample_weights"))
            divergence = self._divergence(batch, logits, targets)
            self.log_dict({"train/task_loss": task_loss, "train/distillation": divergence})
            loss = self.distillation.mix(task_loss, divergence)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _divergence(self, batch: Batch, logits: Tensor, targets: Tensor) -> Tensor:
        assert self.distillation is not None
        with torch.no_grad():
            said = self._teacher[0].logits(batch)
        if said.shape != logits.shape:
            raise UsageError(
                f"the teacher {self.distillation.teacher} has logits of shape {tuple(said.shape)}, the student of "
                f"{tuple(logits.shape)}: both need the same vocabulary or classes"
            )
        return self.distillation.divergence(logits, said, self.objective.counted(logits, targets))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """What the objective says of each sample, classes by their names, and the samples' ids if there are any."""
        ids: dict[str, Any] = {"sample_ids": batch["sample_ids"]} if "sample_ids" in batch else {}
        targets = self.targets(batch) if "targets" in batch or "labels" in batch else None
        said: dict[str, Any] = self.objective.predictions(self.logits(batch), targets)
        if self.labels is not None and "label" in said:
            said["label"] = [self.labels[i] for i in said["label"].tolist()]
        return ids | said

    def _evaluate(self, batch: Batch, stage: str) -> None:
        self.objective.update(self.logits(batch), self.targets(batch))
        metrics: dict[str, Any] = {f"{stage}/{name}": metric for name, metric in self.objective.metrics().items()}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val")


def _of_inference(state: Tensor | list[Tensor]) -> bool:
    return isinstance(state, Tensor) and state.is_inference()
