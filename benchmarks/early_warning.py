"""How many optimizer steps before the loss the attention alarms speak, and how often they speak on healthy runs.

Two failures are provoked, each in a few hundred steps of a byte-level language model on the embedded corpus:

- a learning rate of 1e-2 to 1e-1 (pre-LN, 4 layers, 200 steps), where without QK-norm (Dehghani et al. 2023) the
  attention logits grow and attention collapses onto single keys, while the loss falls, only less than it should;
- post-LN without warm-up (12 layers, 300 steps), which never learns more than how frequent each byte is.

Runs that are compared share the seed, and so the batches. The loss of a run *departs* from that of a healthy run at the
first step from which on, until the end, the mean of their difference over the last 10 steps stays above a margin. Two
margins are shown, 0.1 and 0.2 nats; a run that only crosses one in its last 10 steps does not count. *Lead* is the step
of departure minus that of the first alarm: positive when the alarm came first. An alarm is said at the last of the
measurements it needs, and that is the step given here. Too high a learning rate costs loss in more ways than through
attention, so those runs are compared twice: with the best learning rate, and with the same one and QK-norm.

    python benchmarks/early_warning.py            # three seeds, about 7 minutes on one core
    python benchmarks/early_warning.py --quick    # one seed of the clearest runs
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lit_callbacks import AttentionEntropyMonitor
from lit_transformer import LanguageModelingData, LitCausalLM, TransformerConfig, WarmupCosine

D_MODEL, HEADS, LENGTH = 64, 4, 64
SMOOTHING, MARGINS = 10, (0.1, 0.2)
EVERY, UNIFORM_AFTER = 5, 200
"""So dense because the runs are short: as many measurements in 10,000 steps would be 250 apart. The healthy post-LN
runs have all but uniform attention for up to 190 steps, of which 150 are their warm-up; that sets the second number.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run; the defaults are those of the sweep over learning rates."""

    name: str
    lr: float
    qk_norm: bool = False
    norm_placement: Any = "pre"
    positions: Any = "learned"
    init: Any = "gpt2"
    layers: int = 4
    batch_size: int = 12
    steps: int = 200
    warmup: int = 20
    min_lr_ratio: float = 0.1
    beta2: float = 0.95
    clip: float | None = 1.0
    activation: Any = "gelu"


def sweep(lr: float, qk_norm: bool = False) -> Recipe:
    """Pre-LN with clipping and a short warm-up: all that is usual, but for the learning rate."""
    return Recipe(name=f"LR {lr:g}{', QK-norm' * qk_norm}", lr=lr, qk_norm=qk_norm)


def deep(norm_placement: str, warmup: int) -> Recipe:
    """Twelve layers with Adam as it is, a constant learning rate after warm-up, and no clipping."""
    return Recipe(
        name=f"{norm_placement}-LN, {f'{warmup} steps of' if warmup else 'no'} warm-up",
        lr=1e-3,
        norm_placement=norm_placement,
        init="xavier",
        layers=12,
        batch_size=16,
        steps=300,
        warmup=warmup,
        min_lr_ratio=1.0,
        beta2=0.999,
        clip=None,
    )


BEST = sweep(3e-3)
ROTARY = Recipe(name="LR 0.003, rotary, 400 steps", lr=3e-3, positions="rotary", steps=400)
"""Some heads of a healthy model learn to look at few keys, within a few measurements when positions are rotary."""

UNHEALTHY: dict[Recipe, tuple[Recipe, ...]] = {
    **{sweep(lr): (BEST, sweep(lr, qk_norm=True)) for lr in (1e-2, 3e-2, 1e-1)},
    deep("post", 0): (deep("pre", 0), deep("post", 150)),
}
"""Each with the healthy runs its loss is compared with."""

HEALTHY = (
    sweep(1e-3),
    BEST,
    ROTARY,
    *(sweep(lr, qk_norm=True) for lr in (1e-2, 3e-2, 1e-1)),
    deep("pre", 0),
    deep("post", 150),
)

QUICK_UNHEALTHY = {sweep(3e-2): (BEST,), deep("post", 0): (deep("pre", 0),)}
QUICK_HEALTHY = (BEST, ROTARY, deep("pre", 0))


class QKNorm(nn.Module):
    """LayerNorm of each head's queries and keys, behind the projection that makes them: ``(B, T, 3 D)`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.LayerNorm(D_MODEL // HEADS), nn.LayerNorm(D_MODEL // HEADS)

    def forward(self, qkv: Tensor) -> Tensor:
        """Values stay as they are."""
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return torch.stack([self.q(q), self.k(k), v], dim=-3).flatten(-3)


def build(recipe: Recipe) -> LitCausalLM:
    """The model and its optimizer."""
    config = TransformerConfig(
        max_length=LENGTH,
        d_model=D_MODEL,
        n_layers=recipe.layers,
        n_heads=HEADS,
        norm_placement=recipe.norm_placement,
        positions=recipe.positions,
        init=recipe.init,
        activation=recipe.activation,
        bias=False,
        tie_embeddings=False,
        attention_dropout=0.0,
        ffn_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    )
    optimizer = partial(torch.optim.AdamW, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=0.0)
    module = LitCausalLM(config, optimizer, WarmupCosine(recipe.warmup, recipe.min_lr_ratio))
    if recipe.norm_placement == "post":  # its residual stream has unit scale from the first norm on; the input too
        nn.init.normal_(module.model.token_embedding.weight, std=1.0)
        nn.init.normal_(module.model.get_parameter("positions.embedding.weight"), std=0.1)
    if recipe.qk_norm:
        for block in module.model.blocks:
            attention = block.get_submodule("attention.sublayer")
            attention.qkv = nn.Sequential(attention.get_submodule("qkv"), QKNorm())
    return module


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Keep it."""
        self.values.append(outputs["loss"].detach())


@dataclass(frozen=True)
class Run:
    """What came of a recipe with one seed: the loss of each step, and the steps of each kind of alarm."""

    loss: Tensor
    alarms: dict[str, list[int]]

    @property
    def final_loss(self) -> float:
        """Over the last steps."""
        return self.loss[-SMOOTHING:].mean().item()

    def departs(self, healthy: "Run", margin: float) -> int | None:
        """The step from which on the smoothed loss stays above that of a healthy run, or None."""
        above = (self.loss - healthy.loss).unfold(0, SMOOTHING, 1).mean(1) > margin
        within = (~above).nonzero()
        step = SMOOTHING - 1 + (int(within[-1]) + 1 if len(within) else 0)
        return step if step <= len(self.loss) - SMOOTHING else None


def train(recipe: Recipe, seed: int) -> Run:
    """A fit with the monitor; alarms are read from the run folder."""
    seed_everything(seed, verbose=False)
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=recipe.steps,
            gradient_clip_val=recipe.clip,
            limit_val_batches=0,
            logger=False,
            callbacks=[losses, AttentionEntropyMonitor(every_n_steps=EVERY, uniform_after=UNIFORM_AFTER)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = LanguageModelingData(block_size=LENGTH, batch_size=recipe.batch_size, seed=seed)
        trainer.fit(build(recipe), data)
        file = Path(folder, "events.jsonl")
        events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    alarms: dict[str, list[int]] = {}
    for event in events:
        if event["event"] == "alarm":
            alarms.setdefault(event["alarm"], []).append(event["step"])
    return Run(torch.stack(losses.values), alarms)


def by_seed(values: Iterable[object]) -> str:
    """One after another."""
    return " / ".join("none" if value is None else str(value) for value in values)


def kinds(runs: list[Run]) -> list[str]:
    """The alarms of some runs."""
    return sorted({kind for run in runs for kind in run.alarms})


def unhealthy_rows(name: str, runs: list[Run], healthy_name: str, healthy: list[Run]) -> Iterable[str]:
    """A row for each kind of alarm: when, and how long before the loss departs."""
    for kind in kinds(runs) or ["none"]:
        first = [min(run.alarms.get(kind, []), default=None) for run in runs]
        cells = [name, kind, by_seed(first), healthy_name]
        for margin in MARGINS:
            departs = [run.departs(other, margin) for run, other in zip(runs, healthy, strict=True)]
            leads = [d - f if d is not None and f is not None else None for d, f in zip(departs, first, strict=True)]
            cells += [by_seed(departs), by_seed(None if lead is None else f"{lead:+d}" for lead in leads)]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, and only the clearest runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    unhealthy, healthy = (QUICK_UNHEALTHY, QUICK_HEALTHY) if arguments.quick else (UNHEALTHY, HEALTHY)
    seeds = range(1 if arguments.quick else arguments.seeds)
    start = time.process_time()
    runs = {recipe: [train(recipe, seed) for seed in seeds] for recipe in (*unhealthy, *healthy)}

    print(
        f"measured every {EVERY} steps, uniform_after={UNIFORM_AFTER}, {len(seeds)} seed(s), fp32, one thread, torch "
        f"{torch.__version__}: {(time.process_time() - start) / 60:.0f} minutes\n"
    )
    columns = ["run", "alarm", "first at step", "healthy run"]
    columns += [cell for margin in MARGINS for cell in (f"loss {margin} above it from step", "lead")]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for recipe, others in unhealthy.items():
        for other in others:
            print("\n".join(unhealthy_rows(recipe.name, runs[recipe], other.name, runs[other])))

    names = sorted({"entropy_collapse", "attention_uniform", *(kind for many in runs.values() for kind in kinds(many))})
    print(f"\n| healthy run | final loss | {' | '.join(f'{name}: number' for name in names)} |")
    print(f"|---|---|{'---|' * len(names)}")
    for recipe in healthy:
        losses = by_seed(f"{run.final_loss:.2f}" for run in runs[recipe])
        counts = [by_seed(len(run.alarms.get(name, [])) for run in runs[recipe]) for name in names]
        print(f"| {recipe.name} | {losses} | {' | '.join(counts)} |")
    for recipe in unhealthy:
        print(f"\n{recipe.name}: final loss {by_seed(f'{run.final_loss:.2f}' for run in runs[recipe])}", end="")
    alarmed = sum(bool(run.alarms) for recipe in healthy for run in runs[recipe])
    print(f"\n\nfalse alarms: in {alarmed} of {len(healthy) * len(seeds)} healthy runs")


if __name__ == "__main__":
    main()
