"""What Lightning, our module and the default callbacks cost, and whether the recipe learns as well as its reference.

One process, one thread. Each step of a real ``Trainer.fit`` is followed by one step of a bare training loop on the very
same batch, with the same optimizer, schedule and clipping, so that both see the same machine. Time is process CPU time;
the ratio is taken pair by pair. Both models are then evaluated on the same held-out text.

    python benchmarks/throughput.py --nanogpt DIR     # DIR holds model.py of karpathy/nanoGPT
    python benchmarks/throughput.py                   # without it: torch.nn.TransformerEncoder
"""

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.nn import functional as F

import lit_callbacks
from lit_transformer import LanguageModelingData, LitCausalLM, TransformerConfig, WarmupCosine
from lit_transformer.optim import ParamGroups
from lit_transformer.run.metrics_file import MetricsFile

LAYERS, D_MODEL, HEADS, LENGTH, BATCH, VOCAB = 4, 192, 6, 256, 8, 256
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
SCHEDULE = WarmupCosine(warmup=0.1)


class TorchModel(nn.Module):
    """The same model from torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(LENGTH, D_MODEL)
        layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, 4 * D_MODEL, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(D_MODEL), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))
        for name, p in self.named_parameters():
            if p.ndim > 1:
                scaled = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * LAYERS) ** 0.5 if scaled else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss."""
        x = self.encoder(self.token(ids) + self.position.weight, mask=self.mask, is_causal=True)
        logits = x @ self.token.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_peer(nanogpt: str | None) -> tuple[str, nn.Module]:
    """The reference model, whose forward returns (logits, loss)."""
    if nanogpt is None:
        return "torch.nn.TransformerEncoder", TorchModel()
    sys.path.insert(0, nanogpt)
    with contextlib.redirect_stdout(io.StringIO()):
        from model import GPT, GPTConfig

        config = GPTConfig(
            block_size=LENGTH, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=D_MODEL, dropout=0.0, bias=True
        )
        return "nanoGPT", GPT(config)


class BareLoop(Callback):
    """After each step of fit, one step of the peer on the same batch; last of the callbacks, so it sees all of ours."""

    def __init__(self, peer: nn.Module, steps: int) -> None:
        self.peer, self.steps = peer, steps
        self.optimizer = torch.optim.AdamW(
            ParamGroups().build(peer), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
        )
        self.fit_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.mark = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first step is timed from here, later ones from the end of the peer's step."""
        self.mark = self.mark or time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop our clock, run the peer, start our clock."""
        end = time.process_time()
        self.fit_seconds.append(end - self.mark)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * SCHEDULE.factor(batch_idx, self.steps)
        loss = self.peer(batch["input_ids"], batch["targets"])[1]
        loss.backward()
        nn.utils.clip_grad_norm_(self.peer.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark = time.process_time()
        self.bare_seconds.append(self.mark - end)


def run(seed: int, steps: int, nanogpt: str | None) -> tuple[str, list[float], list[float], float, float]:
    """One seed: the peer's name, seconds per step of fit and of the bare loop, validation loss of both."""
    seed_everything(seed, verbose=False)
    name, peer = make_peer(nanogpt)
    dropout = dict.fromkeys(("attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    config = TransformerConfig(
        vocab_size=VOCAB,
        max_length=LENGTH,
        d_model=D_MODEL,
        n_layers=LAYERS,
        n_heads=HEADS,
        positions="learned",
        **dropout,
    )
    module = LitCausalLM(config, partial(torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=DECAY), SCHEDULE)
    data = LanguageModelingData(block_size=LENGTH, batch_size=BATCH, seed=seed)
    bare = BareLoop(peer, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=CLIP,
            limit_val_batches=0,
            log_every_n_steps=10,
            logger=MetricsFile(Path(folder) / "metrics.csv"),
            callbacks=[LearningRateMonitor(), *lit_callbacks.recommended(), bare],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)
    module.eval()
    peer.eval()
    ours, theirs, tokens = 0.0, 0.0, 0
    with torch.inference_mode():
        for batch in data.val_dataloader():
            ids, targets = batch["input_ids"], batch["targets"]
            ours += F.cross_entropy(module(ids).flatten(0, 1), targets.flatten(), reduction="sum").item()
            theirs += peer(ids, targets)[1].item() * targets.numel()
            tokens += targets.numel()
    return name, bare.fit_seconds, bare.bare_seconds, ours / tokens, theirs / tokens


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder with nanoGPT's model.py")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{LAYERS} layers x {D_MODEL}, {BATCH} x {LENGTH} tokens a step, fp32, 1 thread, torch {torch.__version__}")
    ratios: list[float] = []
    losses: list[float] = []
    for seed in range(arguments.seeds):
        name, fit, bare, ours, theirs = run(seed, arguments.steps, arguments.nanogpt)
        pairs = [a / b for a, b in zip(fit[10:], bare[10:], strict=True)]  # the first steps warm up
        ratios += pairs
        losses.append(ours / theirs)
        print(
            f"seed {seed}: fit {statistics.median(fit) * 1e3:.0f} ms, {name} in a bare loop "
            f"{statistics.median(bare) * 1e3:.0f} ms a step (process CPU time), paired ratio "
            f"{statistics.median(pairs):.3f}; validation loss {ours:.4f} against {theirs:.4f} nats per byte, "
            f"ratio {ours / theirs:.4f}",
            flush=True,
        )
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"time: fit / bare loop {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    print(f"loss: ours / theirs {statistics.mean(losses):.4f}, worst {max(losses):.4f}, at equal tokens")


if __name__ == "__main__":
    main()
