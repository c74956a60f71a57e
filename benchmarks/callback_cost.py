"""What each callback costs a training step, in CPU time.

Other steps: whole fits of a model with two parameters, with the callback against without it, in turns; what Lightning
does around the hooks is in it. Measured steps: inside the steps of a real fit, where every step is its own pair, the
time spent in the callback's hooks against the time of the same step without them. A callback whose hooks are empty is
timed the same way, and what that takes is subtracted: it is the clock's.

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
TINY_STEPS, TINY_ROUNDS, NEVER = 2000, 9, 10**9


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


class Tiny(LightningModule):
    """Next to nothing, so that what surrounds it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A number."""
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def step_of_a_tiny_fit(callbacks: list[Callback], folder: str) -> float:
    """CPU microseconds a step."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    start = time.process_time()
    trainer.fit(Tiny(), DataLoader(torch.randn(TINY_STEPS, 1)))
    return (time.process_time() - start) / TINY_STEPS * 1e6


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
    never: dict[str, Callable[[], list[Callback]]] = {
        "nothing": list,
        "GradientNormLogger": lambda: [GradientNormLogger(NEVER)],
        "LossCurve": lambda: [LossCurve(NEVER)],
        "NonFiniteGuard": lambda: [NonFiniteGuard()],
        "all three": lambda: [GradientNormLogger(NEVER), LossCurve(NEVER), NonFiniteGuard()],
    }
    due: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    off: dict[str, list[float]] = {name: [] for name in never}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, make in makers.items():
                steps = enumerate(measure(make(), folder))
                due[name] += [pair for step, pair in steps if step >= WARMUP and step % EVERY == 0]
        for _ in range(TINY_ROUNDS):
            for name, make in never.items():
                off[name].append(step_of_a_tiny_fit(make(), folder))

    size = sum(p.numel() for p in Transformer().parameters()) / 1e6
    step_time = statistics.median(plain for pairs in due.values() for _, plain in pairs)
    print(
        f"{size:.1f} M parameters, batch {BATCH} x {LENGTH} tokens, AdamW, fp32, one thread: {step_time * 1e3:.0f} ms"
    )
    print("| callback | other steps, µs | measured steps, % |")
    print("|---|---|---|")
    clock = statistics.median(hooks for hooks, _ in due.pop("nothing"))
    without = off.pop("nothing")
    for name in due:
        other = statistics.median(a - b for a, b in zip(off[name], without, strict=True))
        share = 100 * statistics.median((hooks - clock) / plain for hooks, plain in due[name])
        print(f"| `{name}` | {other:.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
