"""Fine-tuning of Hugging Face models."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_transformer.distillation import Distillation
from lit_transformer.errors import UsageError
from lit_transformer.hugging_face import Lora, Task, build, keeps_apart, load, reinitialize, with_lora
from lit_transformer.nn.positions import document_places
from lit_transformer.objectives import IGNORED, ClassObjective, Objective, TokenObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.strategies.deferred import Draws
from lit_transformer.strategies.spread import spread
from lit_transformer.task import Batch, LitTask

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


class LitPretrained(LitTask):
    """A Hugging Face model under our recipe: optimizer, groups, schedule, callbacks, checkpoints.

    The loss is computed here from the model's logits, so that label smoothing, distillation and the metrics are those
    of our own models. The model is in training mode and fp32 (``from_pretrained`` leaves it in ``eval()``, without
    dropout, and in the dtype of the file); lower precision is the Trainer's.

    Logs:
        train/loss: mean loss in nats, with label smoothing and distillation if there are any.
        val/…, test/…: loss; for tokens also perplexity and accuracy; for classes accuracy and F1.

    Args:
        path: A folder with ``config.json`` and weights, or a name on the hub. What the folder lacks, such as the
            classifier on top of a language model, is newly initialised.
        task: ``causal_lm``, ``masked_lm``, ``classification`` or ``seq2seq``.
        labels: Names of the classes. Under the command line they come from the data, if it has ``labels``.
        num_labels: Number of classes where they have no names; by default as many as the model has.
        multi_label: Whether a sample may be in any number of classes.
        lora: Train only a low-rank addition, and the head.
        reinit_layers: Initialise so many of the top layers, and a pooler, anew before training: the top of a language
            model is specialised on predicting tokens (Zhang et al. 2021).
        optimizer: See :class:`~lit_transformer.recipe.LitRecipe`.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.
        label_smoothing: See :class:`~lit_transformer.objectives.Objective`.
        distillation: See :class:`~lit_transformer.task.LitTask`.
        architecture: The configuration as a dict in place of ``path``: the model is built with random weights. A
            checkpoint holds it, so that it can be loaded where the folder is not.

    Shapes:
        A batch is a dict with ``input_ids`` ``(B, T)``, ``attention_mask`` if there is padding, and ``targets``: for
        classes ``(B,)`` (``(B, C)`` with ``multi_label``), for tokens ``(B, T)`` with the token that each position
        predicts, or -100; seq2seq has ``decoder_input_ids`` beside them. In place of ``targets`` there may be
        ``labels`` as Hugging Face's collators make them. Causal models take ``document_ids`` ``(B, T)`` where several
        documents share a row: they are told by places that begin at 0 again.

    Raises:
        ValueError: If an argument is out of range, or neither or both of ``path`` and ``architecture`` are given.
        UsageError: If there is no such folder or name, it is of another kind, or the ``hf`` extra is not installed.

    Example:
        >>> small = {"vocab_size": 9, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "eos_token_id": 0}
        >>> task = LitPretrained(architecture={"model_type": "gpt2", "bos_token_id": 0, **small})
        >>> task.logits({"input_ids": torch.zeros(2, 8, dtype=torch.long)}).shape
        torch.Size([2, 8, 9])
    """

    def __init__(
        self,
        path: str | None = None,
        task: Task = "causal_lm",
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        multi_label: bool = False,
        lora: Lora | None = None,
        reinit_layers: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
        distillation: Distillation | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        if (path is None) == (architecture is None):
            raise ValueError(
                f"give path, a folder or a name on the hub; or architecture, to begin with random weights: got "
                f"path={path!r} and {'an' if architecture else 'no'} architecture"
            )
        if reinit_layers < 0:
            raise ValueError(f"reinit_layers must be at least 0, got {reinit_layers}")
        if reinit_layers and lora is not None:
            raise ValueError(f"reinit_layers={reinit_layers} and lora do not go together: LoRA trains no whole layer")
        names = labels
        if names is None and num_labels is not None:
            names = [f"LABEL_{i}" for i in range(num_labels)]
        fresh: list[str] = []
        if path is not None:
            model, fresh = load(path, task, names, multi_label)
        else:
            model = build(architecture or {}, task, names, multi_label)
        super().__init__(
            _objective(task, model.config.num_labels, multi_label, label_smoothing),
            optimizer,
            schedule,
            target_batch_tokens,
            param_groups,
            distillation,
        )
        self.kind: str = task
        if task == "classification":
            self.labels = [name for _, name in sorted(model.config.id2label.items())]
        self.architecture = model.config.to_dict()
        self.architecture.pop("transformers_version", None)  # an upgrade does not make it another model
        self.architecture.pop("_name_or_path", None)
        if reinit_layers:
            reinitialize(model, build(self.architecture, task), reinit_layers)
        lora = Lora(**lora) if isinstance(lora, Mapping) else lora
        if lora is not None and lora.modules_to_save is None:
            lora = replace(lora, modules_to_save=sorted({name.rpartition(".")[0] for name in fresh}))
        self.model: Any = (model if lora is None else with_lora(model, lora, task)).train()
        self.save_hyperparameters(
            {
                "path": None,  # the weights are the checkpoint's
                "task": task,
                "multi_label": multi_label,
                "lora": None if lora is None else asdict(lora),
                "architecture": self.architecture,
            }
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits, of the inputs that the model takes."""
        if self.kind in ("causal_lm", "seq2seq"):
            inputs["use_cache"] = False  # type: ignore[assignment]  # keys and values of a past there is not
        logits: Tensor = self.model(**inputs).logits
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Likewise, of a batch."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        if "document_ids" in batch:
            inputs["position_ids"] = document_places(batch["document_ids"])
        if self.kind == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._base().prepare_decoder_input_ids_from_labels(self.targets(batch))
        logits: Tensor = self(**inputs)
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """``targets``; or ``labels``, which Hugging Face's causal models move on by one token inside."""
        if "targets" in batch:
            return batch["targets"]
        if "labels" not in batch:
            raise UsageError(f"expected a batch with targets or labels, got {', '.join(batch)}")
        labels = batch["labels"]
        return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.kind == "causal_lm" else labels

    def configure_model(self) -> None:
        """Spread the model over devices, where the strategy leaves that to the module."""
        if self._trainer is not None:
            spread(self.model, None, self.trainer.strategy, self._device_mesh, Draws())

    def setup(self, stage: str) -> None:
        """Check that the data fits the model."""
        data, config = getattr(self.trainer, "datamodule", None), self._base().config
        length = "max_position_embeddings"
        for ours, theirs in (("vocab_size", "vocab_size"), ("block_size", length), ("max_length", length)):
            needed, there = getattr(data, ours, None), getattr(config, theirs, None)
            if needed is not None and there is not None and needed > there:
                raise UsageError(
                    f"the data has {ours}={needed}, but the model {theirs}={there}: use the model's own tokenizer, "
                    "and no longer texts than it can take"
                )
        if getattr(data, "packing", False) and not (self.kind == "causal_lm" and keeps_apart(self.model)):
            raise UsageError(
                f"the data has packing, and in {type(self._base()).__name__} ({self.kind}) the documents of a block "
                "would see each other; leave packing out"
            )
        super().setup(stage)

    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as Hugging Face does; what LoRA has learned is added to the weights of a copy."""
        merged = copy.deepcopy(self.model).merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        merged.save_pretrained(folder)


def _objective(task: Task, num_labels: int, multi_label: bool, label_smoothing: float) -> Objective:
    if task == "classification":
        return ClassObjective(num_labels, multi_label, label_smoothing)
    if multi_label:
        raise ValueError(f"multi_label is about classes, and the task is {task}")
    return TokenObjective(label_smoothing)
