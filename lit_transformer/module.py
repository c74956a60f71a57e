"""The LightningModule that all tasks with our own transformer share."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from lit_transformer.distillation import Distillation
from lit_transformer.errors import UsageError
from lit_transformer.nn import Transformer, TransformerConfig, check_ids
from lit_transformer.objectives import Objective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.strategies import TensorParallel
from lit_transformer.strategies.deferred import Draws, make_model
from lit_transformer.strategies.sharded import is_in_pieces, shards
from lit_transformer.strategies.spread import spread
from lit_transformer.task import LitTask
from lit_transformer.warm_start import load_body


class LitTransformer(LitTask):
    """A transformer with the recipe that trains it; a task adds objective and batches.

    Args:
        config: Shape and choices of the model.
        objective: Loss and metrics.
        optimizer: See :class:`~lit_transformer.recipe.LitRecipe`.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.
        distillation: See :class:`~lit_transformer.task.LitTask`.
        init_from: A checkpoint of ours to take the weights from, all but those of another head. On the command line
            also the folder of a run, for its best checkpoint.
        compile_model: Whether ``torch.compile`` makes one graph of the model for ``fit``.
        network: Makes the model.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: At the start of fit, as :class:`~lit_transformer.recipe.LitRecipe` says; if the data's blocks or
            texts are longer than ``max_length``; if the checkpoint to start from is of another architecture; if
            the model is to be compiled under ZeRO-3, or under tensor parallelism with activation checkpointing; if
            FSDP1 or ZeRO-3 has cut it already.
        IndexError: If a batch has a token id that is not in the vocabulary.
    """

    def __init__(
        self,
        config: TransformerConfig,
        objective: Objective,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        distillation: Distillation | None = None,
        init_from: str | None = None,
        compile_model: bool = False,
        network: Callable[[TransformerConfig], nn.Module] = Transformer,
    ) -> None:
        super().__init__(objective, optimizer, schedule, target_batch_tokens, param_groups, distillation)
        # A checkpoint hands back what was saved below: plain data.
        self.config = TransformerConfig(**config) if isinstance(config, Mapping) else config
        self.init_from = init_from
        self.compile_model = compile_model
        self.save_hyperparameters(
            {"config": asdict(self.config), "init_from": init_from, "compile_model": compile_model}
        )
        self.model: Any
        self.model, self._draws = make_model(network, self.config)
        self._has_weights = False

    def setup(self, stage: str) -> None:
        """Check that the data fits the model; compile it."""
        data = getattr(self.trainer, "datamodule", None)
        for name, what in (("block_size", "blocks"), ("max_length", "texts"), ("max_target_length", "targets")):
            length = getattr(data, name, None)
            if length is not None and length > self.config.max_length:
                raise UsageError(
                    f"the data comes in {what} of {length} tokens, but the model takes {self.config.max_length} at "
                    f"most; lower data.init_args.{name} or raise model.init_args.config.max_length"
                )
        vocab_size = getattr(data, "vocab_size", None)
        if vocab_size is not None and vocab_size > self.config.vocab_size:
            raise UsageError(
                f"the data has {vocab_size} token ids, but the model takes {self.config.vocab_size}; set "
                f"model.init_args.config.vocab_size={vocab_size}"
            )
        # Lightning warns of every such hook where there is a data module, although it is called all the same.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        super().setup(stage)
        if stage == "fit" and self.compile_model:
            strategy = self.trainer.strategy
            if (
                isinstance(strategy, TensorParallel)
                and strategy.group_size > 1
                and self.config.activation_checkpointing
            ):
                # AOTAutograd takes the mesh of devices for something to keep for the backward pass (torch 2.13).
                raise UsageError(
                    "compile_model and activation_checkpointing do not go together under tensor parallelism: set "
                    "compile_model to false, or activation_checkpointing to 0"
                )
            if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
                raise UsageError(
                    "compile_model does not go with DeepSpeed's stage 3, whose parameters are empty when torch looks "
                    "at them: set it to false, or take strategy fsdp2"
                )
            # Gathering parameters is no part of a graph.
            self.model.compile(fullgraph=not shards(strategy))

    def configure_model(self) -> None:
        """Spread the model over devices, where the strategy leaves that to the module; give it its weights."""
        if self._trainer is not None:
            strategy = self.trainer.strategy
            if self.trainer.state.fn == "fit" and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
                if is_in_pieces(self.model):
                    raise UsageError(
                        f"{type(strategy).__name__} has cut this model into pieces for an earlier fit or validation, "
                        "and cannot train it from there: make the task anew, or take strategy fsdp2"
                    )
                with self._draws:
                    self._start_from_weights()  # before they are in pieces
            spread(self.model, self.config, strategy, self._device_mesh, self._draws)
            self._draws = Draws()

    def cpu(self) -> Self:
        """To the CPU, as strategies do at the end, also where a run has ended before there were weights to move."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Look at the ids while looking is cheap: on a device, a wrong one ends the process without a reason."""
        if self.device.type != "cpu" and isinstance(batch, Mapping) and "input_ids" in batch:
            check_ids(batch["input_ids"], self.config.vocab_size)
        return batch

    def on_fit_start(self) -> None:
        """Take the weights to start from, unless a checkpoint has been loaded, or this is a second fit."""
        super().on_fit_start()
        self._start_from_weights()

    def _start_from_weights(self) -> None:
        if self.init_from is not None and not self._has_weights and self.trainer.ckpt_path is None:
            load_body(self, self.init_from)
        self._has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights are the ones to go on with."""
        super().on_load_checkpoint(checkpoint)
        self._has_weights = True
