"""The gallery: five runs that every trainer of transformers meets, and the reports they leave behind.

Each is a byte-level language model of a few layers on the embedded corpus, some hundred steps, watched every five of
them by Lightning's CSVLogger and the callbacks, as in anybody's project. The pictures go to ``docs/gallery``, the pages
beside the runs.

    python benchmarks/gallery.py                 # all five, one or two minutes each on one core
    python benchmarks/gallery.py healthy spike   # some of them
    python benchmarks/gallery.py --runs FOLDER   # keep runs and pages there
"""

import argparse
import dataclasses
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from early_warning import BEST, LENGTH, Recipe, build, deep, sweep
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    GradientNormLogger,
    LossSpikeRecovery,
    ThroughputLogger,
)
from lit_callbacks.report import read_run, write_report
from lit_callbacks.testing import Fault, FaultInjector
from lit_transformer import LanguageModelingData

PICTURES = Path(__file__).parents[1] / "docs" / "gallery"
EVERY, UNIFORM_AFTER = 5, 200
SPIKE = Fault("learning_rate", step=180, n_steps=3, factor=60.0)


class DeadLayer(Callback):
    """From one step on, what goes into the ReLUs of one layer is 20 lower, as with a bias that was thrown far off."""

    def __init__(self, step: int, layer: int) -> None:
        self.step, self.layer = step, layer

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Once: no unit is left with a gradient that could bring it back."""
        if trainer.global_step == self.step:
            up = pl_module.get_submodule(f"model.blocks.{self.layer}.feed_forward.sublayer.up")
            up.register_forward_hook(lambda module, inputs, output: output - 20.0)


RUNS: dict[str, tuple[Recipe, list[Callback]]] = {
    "healthy": (dataclasses.replace(BEST, steps=300), []),
    "post_ln_without_warmup": (deep("post", 0), []),
    "entropy_collapse": (dataclasses.replace(sweep(3e-2), steps=300), []),
    "recovered_spike": (dataclasses.replace(BEST, steps=300), [LossSpikeRecovery(), FaultInjector([SPIKE])]),
    "dead_relu_layer": (dataclasses.replace(BEST, steps=300, activation="relu"), [DeadLayer(step=120, layer=2)]),
}


def train(name: str, recipe: Recipe, more: list[Callback], folder: Path) -> Path:
    """One run, in its folder."""
    seed_everything(1, verbose=False)
    logger = CSVLogger(folder, name=None, version=name)
    watching = [
        GradientNormLogger(every_n_steps=EVERY),
        AttentionEntropyMonitor(every_n_steps=EVERY, uniform_after=UNIFORM_AFTER),
        ActivationStatsMonitor(every_n_steps=EVERY),
        DeadNeuronDetector(every_n_steps=EVERY),
        ThroughputLogger(every_n_steps=EVERY),
        LearningRateMonitor(),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=recipe.steps,
        gradient_clip_val=recipe.clip,
        limit_val_batches=0,
        log_every_n_steps=EVERY,
        logger=logger,
        callbacks=[*watching, *more],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(recipe), LanguageModelingData(block_size=LENGTH, batch_size=recipe.batch_size, seed=1))
    return folder / name


def main() -> None:
    """Train, draw, and print each verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], help="which; all by default")
    parser.add_argument("--runs", type=Path, help="where to keep the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.names or RUNS:
            run = read_run(train(name, *RUNS[name], arguments.runs or Path(temporary)))
            write_report([run], PICTURES / f"{name}.png")
            write_report([run], run.folder / "report.html")
            print(f"{name}:", *run.diagnosis().sentences, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
