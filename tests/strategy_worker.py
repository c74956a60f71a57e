"""Run by test_strategies.py in two processes, and imported by it: the same training under any strategy."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from pytorch_optimizer import ScheduleFreeAdamW
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
    LitPretrained,
    LitSeq2Seq,
    SequencePairData,
    TransformerConfig,
    WarmupConstant,
)
from lit_transformer.deferred import deferred_weights
from lit_transformer.errors import UsageError

STEPS = 30
STRATEGIES = {  # devices, parts of a batch
    "single": (1, 1, "auto"),
    "ddp": (2, 2, "ddp"),
    "fsdp2": (2, 2, "fsdp2"),
    "tensor_parallel": (2, 1, "tensor_parallel"),
    "tensor_parallel_and_fsdp2": (4, 2, "tensor_parallel"),
}
CONFIG = TransformerConfig(
    vocab_size=256, max_length=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, activation="swiglu", d_ff=32,
    bias=False,  # of a key: noise
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
    folder,
    text,
    strategy,
    *,
    accumulate=1,
    clip=None,
    precision="32-true",
    trouble=None,
    steps=STEPS,
    resume=None,
    config=CONFIG,
    optimizer=torch.optim.AdamW,
):
    """Losses, logged metrics, events and weights of a run."""
    devices, parts, strategy = STRATEGIES[strategy]
    torch.manual_seed(0)
    with deferred_weights() if strategy in ("fsdp2", "tensor_parallel") else nullcontext():
        task = Task(config, partial(optimizer, lr=3e-3), schedule=None)
    task.trouble = trouble
    # The same global batch: one process takes in one micro-batch what two take in theirs.
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=8 // parts)
    losses, logger = Losses(), MemoryLogger()
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(
        strategy=strategy, devices=devices, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=accumulate, gradient_clip_val=clip, precision=precision, limit_val_batches=0,
        logger=logger, enable_checkpointing=True, default_root_dir=folder,
        callbacks=[
            losses, GradientNormLogger(5), ParameterStatsLogger(5), AttentionEntropyMonitor(5), DeadNeuronDetector(5),
            ActivationStatsMonitor(5), ThroughputLogger(5), ExactResume(), checkpoint,
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
    }


CASES = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "accumulated_and_clipped": {"accumulate": 2, "clip": 0.5},
    "nan": {"trouble": "nan"},
    "wild": {"trouble": "wild"},
    "damage": {"trouble": "damage"},
}


def refused(folder, text):
    """What is said of what FSDP2 does not have yet."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 1, "n_head": 2}
    gpt2 |= {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    tasks = {
        "texts": (LitSeq2Seq(CONFIG, schedule=None), SequencePairData(max_length=16, max_target_length=16)),
        "schedule_free": (LitCausalLM(CONFIG, partial(ScheduleFreeAdamW, lr=1e-3), WarmupConstant(warmup=2)), data),
        "hugging_face": (LitPretrained(architecture=gpt2, schedule=None), data),
        "autopsy": (LitCausalLM(CONFIG, schedule=None), data),
        "histograms": (LitCausalLM(CONFIG, schedule=None), data),
    }
    callbacks = {"autopsy": [NonFiniteAutopsy()], "histograms": [ParameterStatsLogger(histograms=True)]}
    found = {}
    for name, (task, module) in tasks.items():
        trainer = make_trainer(
            strategy="fsdp2", devices=2, max_steps=1, default_root_dir=folder, callbacks=callbacks.get(name, [])
        )
        try:
            trainer.fit(task, module)
        except (UsageError, SetupError) as error:
            found[name] = str(error)
    return found


def main(out, strategy, text, one_file):
    """Write what each case gives on this rank, and resumed runs: from its own parts, and from a single process."""
    found = {name: fit(out / name, text, strategy, **case) for name, case in CASES.items()}
    found["resumed"] = fit(out / "resumed", text, strategy, resume=str(out / "plain" / "step=10.ckpt"))
    if strategy != "ddp":
        found["from_one_file"] = fit(out / "from_one_file", text, strategy, resume=one_file, steps=15)
    if strategy == "tensor_parallel":
        dropout = replace(CONFIG, attention_dropout=0.1, ffn_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1)
        found["dropout"] = fit(out / "dropout", text, strategy, config=dropout, steps=15)
    if strategy == "fsdp2":
        found["refused"] = refused(out / "refused", text)
    (out / f"{strategy}_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
