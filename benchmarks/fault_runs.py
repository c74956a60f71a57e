"""Short language-model runs with a fault in them, and what people protect them with."""

import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import SpikeDetection
from torch.optim import Optimizer

from lit_callbacks import AdaptiveGradientClipping, LossSpikeRecovery
from lit_callbacks._facts import facts_of
from lit_callbacks._step_skipper import StepSkipper
from lit_callbacks.rules import BestLossRatio, SixSigma, SpikeRule
from lit_callbacks.testing import Fault, FaultInjector
from lit_transformer import LanguageModelingData, LitCausalLM, TransformerConfig, WarmupCosine

LENGTH, BATCH = 64, 12


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run; the default is that of the fault table."""

    lr: float = 3e-3
    steps: int = 360
    warmup: int = 20
    layers: int = 4
    width: int = 64
    batch_size: int = BATCH
    dropout: float = 0.0
    norm_placement: Any = "pre"
    schedule_end: float = 0.1


@dataclass
class Result:
    """What a run came to."""

    loss: float
    steps: int
    curve: list[tuple[int, float]]
    samples: int
    actions: list[list[Any]] = field(default_factory=list)
    steps_lost: int = 0
    ended: str = ""


class Curve(Callback):
    """Remembers the loss that each step was judged on."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Which step it is."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What the loss was."""
        self.points.append((self.step, float(outputs["loss"])))


class SkipOnly(StepSkipper):
    """What a rule gives without the rest of the ladder: the step is skipped, and that is all."""

    def __init__(self, rule: SpikeRule) -> None:
        super().__init__()
        self.rule = rule
        self.actions: list[list[Any]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge and skip."""
        reading = facts_of(trainer).reading(trainer, optimizer)
        assert reading.loss is not None
        # Given a branch, and non-finite values kept out: the original multiplies by zero and is poisoned by one NaN.
        if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
            bad = True
        else:
            bad = self.rule.judge(reading.loss, reading.grad_norm).anomalous
            self.rule.keep(reading.loss, reading.grad_norm, accepted=not bad)
        if bad:
            self.skip(trainer, optimizer, reading)
            self.actions.append([trainer.global_step, "skip"])


class RestoreBestWeights(Callback):
    """The procedure of many tutorials: keep the weights of the best loss, and load them when it is ten times as bad."""

    def __init__(self) -> None:
        self.rule, self.best, self.actions = BestLossRatio(), None, []
        self.lowest = math.inf

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep, or restore: weights alone, not the optimizer's state."""
        loss = float(outputs["loss"])
        if not math.isfinite(loss) or self.rule.judge(loss, 0.0).anomalous:
            if self.best is not None:
                pl_module.load_state_dict(self.best)
                self.actions.append([trainer.global_step - 1, "rollback"])
            return
        self.rule.keep(loss, 0.0, accepted=True)
        if loss < self.lowest:
            self.lowest = loss
            self.best = {name: value.clone() for name, value in pl_module.state_dict().items()}


POLICIES: dict[str, Callable[[], list[Callback]]] = {
    "clip 1.0": list,
    "6-sigma skip": lambda: [SkipOnly(SixSigma())],
    "ZClip": lambda: [AdaptiveGradientClipping()],
    "SpikeDetection": lambda: [SpikeDetection()],
    "best x10, weights": lambda: [RestoreBestWeights()],
    "LossSpikeRecovery": lambda: [LossSpikeRecovery()],
}


def faults_at(step: int) -> dict[str, list[Fault]]:
    """The fault matrix, at a step of a run."""
    fault = partial(Fault, step=step)
    return {
        "none": [],
        "NaN loss": [fault("nan_loss")],
        "infinite loss": [fault("inf_loss")],
        "NaN gradient": [fault("nan_gradient")],
        "NaN activation": [fault("nan_activation")],
        "NaN weight": [fault("nan_weight")],
        "NaN optimizer state": [fault("nan_optimizer_state")],
        "exponent bit": [fault("bit_flip")],
        "LR x60, 3 steps": [fault("learning_rate", n_steps=3, factor=60.0)],
        "LR x10, 20 steps": [fault("learning_rate", n_steps=20, factor=10.0)],
        "shuffled labels, 10": [fault("shuffled_labels", n_steps=10)],
        "random tokens, 10": [fault("random_tokens", n_steps=10)],
        "constant tokens, 10": [fault("constant_tokens", n_steps=10)],
        "exploding batch": [fault("exploding_batch", factor=1000.0)],
    }


def run(seed: int, callbacks: list[Callback], faults: list[Fault], recipe: Recipe = Recipe()) -> Result:
    """Train once, and evaluate on held-out text."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(seed, verbose=False)
        module = LitCausalLM(
            TransformerConfig(
                vocab_size=256,
                max_length=LENGTH,
                d_model=recipe.width,
                n_layers=recipe.layers,
                n_heads=4,
                norm_placement=recipe.norm_placement,
                residual_dropout=recipe.dropout,
            ),
            partial(torch.optim.AdamW, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1),
            WarmupCosine(warmup=recipe.warmup, min_lr_ratio=recipe.schedule_end),
        )
        data = LanguageModelingData(block_size=LENGTH, batch_size=recipe.batch_size, seed=seed)
        injector, curve = FaultInjector(faults), Curve()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=recipe.steps,
            gradient_clip_val=None if any(isinstance(c, AdaptiveGradientClipping) for c in callbacks) else 1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*([injector] if faults else []), *callbacks, curve],
        )
        ended = ""
        try:
            trainer.fit(module, datamodule=data)
            injector.assert_all_fired()
        except Exception as error:
            ended = type(error).__name__
        actions = next((c.actions for c in callbacks if hasattr(c, "actions")), [])
        recovery = next((c for c in callbacks if isinstance(c, LossSpikeRecovery)), None)
        lost = 0
        if recovery is not None:
            report = recovery.state_dict()["report"]
            actions, lost = report["history"], report["counts"]["steps_lost"]
        return Result(validation_loss(module), trainer.global_step, curve.points, data.position(), actions, lost, ended)


@torch.no_grad()
def validation_loss(module: LitCausalLM) -> float:
    """Mean loss over 20 batches of held-out text, the same ones for every run."""
    data = LanguageModelingData(block_size=LENGTH, batch_size=64)
    data.prepare_data()
    data.setup("validate")
    module.eval()
    losses = []
    for batch, _ in zip(data.val_dataloader(), range(20), strict=False):
        losses.append(module.training_loss(batch).item())
    return sum(losses) / len(losses)
