"""What each callback costs a training step, in CPU time, measured inside the steps of a real fit.

Every step is its own pair: the time spent in the callback's hooks against the time of the same step without them. Runs
of the callbacks take turns, so that a change in the machine's mood meets all of them. A callback whose hooks are empty
is timed the same way, and what that takes is subtracted: it is the clock's.

    python benchmarks/callback_cost.py
"""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_callbacks import GradientNormLogger, LossCurve, NonFiniteGuard

VOCABULARY, LENGTH, BATCH, STEPS, ROUNDS, EVERY, WARMUP = 1000, 128, 8, 21, 3, 5, 5


class Transformer(LightningModule):
    """A causal language model of 5 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(VOCABULARY, 256)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(256, VOCABULARY)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH - 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Next-token loss."""
        (tokens,) = batch
        logits = self.head(self.layers(self.embedding(tokens[:, :-1]), mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """CPU seconds of every step, and of the hooks of some callbacks in it."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.steps: list[tuple[float, float]] = []
        self.in_hooks = 0.0
        for callback in callbacks:
            for name in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"):
                setattr(callback, name, self.timed(getattr(callback, name)))

    def timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        """The hook, with its time added up."""

        def wrapper(*args: Any) -> None:
            start = time.process_time()
            hook(*args)
            self.in_hooks += time.process_time() - start

        return wrapper

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self.in_hooks = 0.0
        self.start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """A step is over."""
        self.steps.append((self.in_hooks, time.process_time() - self.start - self.in_hooks))


def measure(callbacks: list[Callback], folder: str) -> list[tuple[float, float]]:
    """(hooks, rest) in CPU seconds for every step of a short fit."""
    seed_everything(0, verbose=False)
    tokens = torch.randint(VOCABULARY, (BATCH * STEPS, LENGTH))
    clock = Clock(callbacks)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[clock, *callbacks],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Transformer(), DataLoader(TensorDataset(tokens), batch_size=BATCH))
    return clock.steps


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    makers: dict[str, Callable[[], list[Callback]]] = {
        "nothing": lambda: [Callback()],
        "GradientNormLogger": lambda: [GradientNormLogger(every_n_steps=EVERY)],
        "LossCurve": lambda: [LossCurve(every_n_steps=EVERY)],
        "NonFiniteGuard": lambda: [NonFiniteGuard()],
        "all three": lambda: [GradientNormLogger(EVERY), LossCurve(EVERY), NonFiniteGuard()],
    }
    due: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    rest: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, make in makers.items():
                for step, pair in enumerate(measure(make(), folder)):
                    if step >= WARMUP:
                        (due if step % EVERY == 0 else rest)[name].append(pair)

    size = sum(p.numel() for p in Transformer().parameters()) / 1e6
    everything = [pair for pairs in (*due.values(), *rest.values()) for pair in pairs]
    step_time = statistics.median(plain for _, plain in everything)
    print(
        f"{size:.1f} M parameters, batch {BATCH} x {LENGTH} tokens, AdamW, fp32, one thread: {step_time * 1e3:.0f} ms"
    )
    print("| callback | other steps, µs | other steps, % | measured steps, % |")
    print("|---|---|---|---|")
    clock = statistics.median(hooks for hooks, _ in rest.pop("nothing"))
    for name in rest:
        off = (statistics.median(hooks for hooks, _ in rest[name]) - clock) * 1e6
        share = [
            100 * statistics.median((hooks - clock) / plain for hooks, plain in pairs[name]) for pairs in (rest, due)
        ]
        print(f"| `{name}` | {off:.1f} | {share[0]:.3f} | {share[1]:.2f} |")


if __name__ == "__main__":
    main()
