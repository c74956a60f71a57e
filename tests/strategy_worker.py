"""Run by test_strategies.py in two processes, and imported by it: the same training under any strategy."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.tensor import DTensor

from helpers import MemoryLogger, make_trainer
from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    ExactResume,
    GradientNormLogger,
    LossSpikeRecovery,
    NonFiniteAutopsy,
    ParameterStatsLogger,
    SetupError,
    ThroughputLogger,
    VerifiedCheckpoint,
)
from lit_transformer import (
    LanguageModelingData,
    LitCausalLM,
    TransformerConfig,
)

STEPS = 30
CONFIG = TransformerConfig(
    vocab_size=256, max_length=16, d_model=16, n_layers=2, n_heads=2, bias=False,  # of a key: noise
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip


class Losses(Callback):
    """The mean loss of each step over its micro-batches and ranks."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.setdefault(self.step, []).append(float(outputs["loss"]) / trainer.accumulate_grad_batches)


class Bytes(Callback):
    """What this rank holds at the end of the last step, and in each of recovery's snapshots."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        def size(tensors):
            return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

        states = [t for state in trainer.optimizers[0].state.values() for t in state.values()]
        recovery = next(c for c in trainer.callbacks if isinstance(c, LossSpikeRecovery))
        rings = [recovery._rewinder._ring] if recovery._rewinder and recovery._rewinder._ring else []
        self.found = {
            "parameters": size(p.data for p in pl_module.parameters()),
            "gradients": size(p.grad for p in pl_module.parameters() if p.grad is not None),
            "states": size(states),
            "snapshots": [
                next(iter(snapshot._saved.values())).untyped_storage().nbytes()
                for ring in rings
                for snapshot in ring.snapshots
            ],
        }


class Task(LitCausalLM):
    """Training in which something happens: a loss that is not a number on one rank, a wild batch, damaged weights."""

    trouble = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (self.trouble, self.global_step) == ("nan", 12) and self.global_rank == self.trainer.world_size - 1:
            loss = loss * float("nan")
        if (self.trouble, self.global_step) == ("wild", 14):
            loss = loss * 1e4
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.trouble, self.global_step) == ("damage", 20):
            self.trouble = None  # once: the data after a rollback is new
            for parameter in self.parameters():
                part = parameter.data.to_local() if isinstance(parameter, DTensor) else parameter.data
                part.mul_(4)


def whole(tensor):
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fit(
    folder, text, strategy, *, accumulate=1, clip=None, precision="32-true", trouble=None, steps=STEPS, resume=None
):
    """Losses, logged metrics, events and weights of a run."""
    devices = 1 if strategy == "single" else 2
    torch.manual_seed(0)
    task = Task(CONFIG, partial(torch.optim.AdamW, lr=3e-3), schedule=None)
    task.trouble = trouble
    # The same global batch: one process takes in one micro-batch what two take in theirs.
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=8 // devices)
    losses, sizes, logger = Losses(), Bytes(), MemoryLogger()
    how, scaler = {"precision": precision}, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    if precision == "scaler":  # that raises its factor now and then
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(
        strategy="auto" if strategy == "single" else strategy, devices=devices, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=accumulate, gradient_clip_val=clip, limit_val_batches=0,
        logger=logger, enable_checkpointing=True, default_root_dir=folder, **how,
        callbacks=[
            losses, sizes, GradientNormLogger(5), ParameterStatsLogger(5), AttentionEntropyMonitor(5),
            DeadNeuronDetector(5), ActivationStatsMonitor(5), ThroughputLogger(5), ExactResume(), checkpoint,
            LossSpikeRecovery(snapshot_every_n_steps=5),
        ],
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume)
    logged = {}
    for step, metrics in logger.calls:
        # What differs by nature: times, and the loss of one rank.
        kept = {k: float(v) for k, v in metrics.items() if not k.startswith(("throughput/", "train/loss"))}
        logged.setdefault(str(step), {}).update(kept)
    return {
        "losses": {str(step): sum(values) for step, values in losses.found.items()},
        "logged": logged,
        "weights": {name: whole(p).double().abs().sum().item() for name, p in task.named_parameters()},
        "position": data.position(),
        "bytes": sizes.found,
        "scale": scaler.get_scale(),
    }


CASES = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"precision": "scaler", "trouble": "damage"},
    "accumulated_and_clipped": {"accumulate": 2, "clip": 0.5},
    "nan": {"trouble": "nan"},
    "wild": {"trouble": "wild"},
    "damage": {"trouble": "damage"},
}


def refused(folder, text):
    """What is said of what FSDP2 does not have yet."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    callbacks = {"autopsy": NonFiniteAutopsy(), "histograms": ParameterStatsLogger(histograms=True)}
    found = {}
    for name, callback in callbacks.items():
        trainer = make_trainer(strategy="fsdp2", devices=2, max_steps=1, default_root_dir=folder, callbacks=[callback])
        try:
            trainer.fit(LitCausalLM(CONFIG, schedule=None), data)
        except SetupError as error:
            found[name] = str(error)
    return found


def main(out, strategy, text):
    """Write what each case gives on this rank, and a resumed run."""
    found = {name: fit(out / name, text, strategy, **case) for name, case in CASES.items()}
    found["resumed"] = fit(out / "resumed", text, strategy, resume=str(out / "plain" / "step=10.ckpt"))
    if strategy == "fsdp2":
        found["refused"] = refused(out / "refused", text)
    (out / f"{strategy}_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
