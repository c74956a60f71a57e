"""Where the norm stands, and whether queries and keys have one: what learns without warm-up, and what stays bounded.

Two stories, three seeds each, on the embedded text, byte by byte. First twelve layers at a learning rate of 1e-3 with
Adam as it is, without clipping: post-LN needs warm-up and without it stays at the unigram loss, the entropy of single
bytes; pre-LN, sandwich, DeepNorm and ReZero learn without. Then four layers, pre-LN, at a learning rate of 3e-2 with
clipping, ten times too high: attention logits explode without QK-norm, and stay bounded with it.

    python benchmarks/norm_placement.py    # a picture and two tables, some twenty minutes on one core
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from lit_transformer.data import LanguageModelingData
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.nn.attention import SelfAttention
from lit_transformer.optim import WarmupCosine

OUT = Path(__file__).parents[1] / "docs" / "norm_placement.png"
SEEDS = (0, 1, 2)
LENGTH, D_MODEL, VALIDATION_BATCHES = 64, 64, 16
DROPOUTS = ("attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run; the defaults are those of the deep ones."""

    label: str
    color: str
    line: str = "-"
    placement: Any = "pre"
    warmup: int = 0
    lr: float = 1e-3
    layers: int = 12
    batch_size: int = 16
    steps: int = 300
    clip: float = math.inf
    qk_norm: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    decays: bool = False


DEEP = [
    Recipe(label="post-LN", color="#c0392b", placement="post"),
    Recipe(label="post-LN, warm-up", color="#c0392b", line="--", placement="post", warmup=150),
    Recipe(label="pre-LN", color="#1f4e9c"),
    Recipe(label="pre-LN, warm-up", color="#1f4e9c", line="--", warmup=150),
    Recipe(label="sandwich", color="#2a7f3f", placement="sandwich"),
    Recipe(label="DeepNorm", color="#8e5ba6", placement="deepnorm"),
    Recipe(label="ReZero", color="#b8860b", placement="rezero"),
]
HOT: dict[str, Any] = {"lr": 3e-2, "layers": 4, "batch_size": 12, "steps": 200, "clip": 1.0, "warmup": 20}
HOT |= {"betas": (0.9, 0.95), "decays": True}
HIGH = [
    Recipe(label="without QK-norm", color="#c0392b", **HOT),
    Recipe(label="with QK-norm", color="#1f4e9c", qk_norm=True, **HOT),
]


@dataclass
class Run:
    """What came of a recipe with one seed."""

    losses: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    validation: float = math.nan


def build(recipe: Recipe) -> Transformer:
    """The model; a stream that is normalised from the first sub-layer on begins at unit scale."""
    config = TransformerConfig(
        max_length=LENGTH,
        d_model=D_MODEL,
        n_layers=recipe.layers,
        n_heads=4,
        norm_placement=recipe.placement,
        qk_norm=recipe.qk_norm,
        init=None if recipe.placement == "deepnorm" or recipe.layers == 4 else "xavier",
        bias=False,
        tie_embeddings=False,
        **dict.fromkeys(DROPOUTS, 0.0),
    )
    model = Transformer(config)
    if recipe.placement in ("post", "deepnorm"):
        nn.init.normal_(model.token_embedding.weight, std=1.0)
        nn.init.normal_(model.get_parameter("positions.embedding.weight"), std=0.1)
    return model


def watch_logits(model: Transformer, largest: list[float]) -> None:
    """Keep the largest attention logit of every pass."""

    def look(module: SelfAttention, inputs: tuple[Any, ...]) -> None:
        with torch.no_grad():
            q, k, _ = module._project(inputs[0], 0)
            scores = (q @ k.mT / math.sqrt(q.size(-1))).tril()
            largest[-1] = max(largest[-1], float(scores.abs().max()))

    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(look)


def nats(model: Transformer, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())


def train(recipe: Recipe, seed: int, data: LanguageModelingData) -> Run:
    """One run, in a plain loop."""
    torch.manual_seed(seed)
    model, run = build(recipe), Run()
    if recipe.layers == 4:
        watch_logits(model, run.logits)
    schedule = WarmupCosine(recipe.warmup, min_lr_ratio=0.1 if recipe.decays else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=0.0)
    for step, batch in zip(range(recipe.steps), data.train_dataloader(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule.multiplier(step, recipe.steps)
        run.logits.append(0.0)
        loss = nats(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        run.losses.append(loss.item())
    run.logits.append(0.0)
    with torch.no_grad():
        batches = [batch for _, batch in zip(range(VALIDATION_BATCHES), data.val_dataloader(), strict=False)]
        run.validation = statistics.mean(nats(model, batch).item() for batch in batches)
    return run


def smooth(values: list[float], n: int = 10) -> list[float]:
    """The mean of the last ``n``."""
    return [statistics.mean(values[max(0, i - n + 1) : i + 1]) for i in range(len(values))]


def plot(axes: Axes, recipe: Recipe, curves: list[list[float]], label: str) -> None:
    """The mean over the seeds, and where they all are."""
    steps = range(len(curves[0]))
    low, high = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
    axes.fill_between(steps, low, high, color=recipe.color, alpha=0.12, linewidth=0)
    mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, mean, color=recipe.color, linestyle=recipe.line, linewidth=1.3, label=label)


def draw(deep: dict[Recipe, list[Run]], high: dict[Recipe, list[Run]], unigram: float) -> None:
    """Losses on the left, logits on the right."""
    figure = Figure(figsize=(9.2, 3.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for recipe, runs in deep.items():
        final = statistics.mean(run.validation for run in runs)
        plot(left, recipe, [smooth(run.losses) for run in runs], f"{recipe.label}: {final:.2f}")
    left.axhline(unigram, color="#999999", linewidth=0.8, linestyle=":")
    left.set_ylim(2.2, 5.7)
    left.set_title("12 layers, learning rate 1e-3: training loss, nats per byte", fontsize=9, loc="left")
    left.legend(title="final validation loss", alignment="left", frameon=False, fontsize=7, title_fontsize=7)
    for recipe, runs in high.items():
        final = statistics.mean(run.validation for run in runs)
        plot(right, recipe, [run.logits[: recipe.steps] for run in runs], f"{recipe.label}: {final:.2f}")
    right.set_yscale("log")
    right.set_title("4 layers, learning rate 3e-2: largest attention logit", fontsize=9, loc="left")
    right.legend(title="final validation loss", alignment="left", frameon=False, fontsize=7, title_fontsize=7)
    for axes in (left, right):
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors="#333333", length=3)
        axes.set_xlabel("optimizer steps", fontsize=9, color="#333333")
    figure.savefig(OUT)


def main() -> None:
    """Train, print two tables, draw a picture."""
    torch.set_num_threads(1)
    found: dict[Recipe, list[Run]] = {}
    unigram = math.nan
    for recipe in (*DEEP, *HIGH):
        found[recipe] = []
        for seed in SEEDS:
            data = LanguageModelingData(block_size=LENGTH, batch_size=recipe.batch_size, seed=seed)
            data.prepare_data()
            data.setup()
            unigram = data.baselines()[0].value
            found[recipe].append(train(recipe, seed, data))
        losses = " / ".join(f"{run.validation:.3f}" for run in found[recipe])
        logits = " / ".join(f"{max(run.logits):.0f}" for run in found[recipe])
        print(f"| {recipe.label} | {losses} |" + (f" {logits} |" if recipe in HIGH else ""), flush=True)
    print(f"unigram {unigram:.3f}")
    draw({recipe: found[recipe] for recipe in DEEP}, {recipe: found[recipe] for recipe in HIGH}, unigram)
    print(OUT)


if __name__ == "__main__":
    main()
