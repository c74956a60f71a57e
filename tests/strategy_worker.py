"""Run by test_strategies.py in two processes, and imported by it: the same training under any strategy."""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from pytorch_optimizer import ScheduleFreeAdamW
from torch.distributed.tensor import DTensor

from cpu_deepspeed import CPUDeepSpeed
from helpers import MemoryLogger, make_trainer
from lit_callbacks import (
    ActivationStatsMonitor,
    AdaptiveGradientClipping,
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
from lit_callbacks._facts import facts_of
from lit_transformer import (
    LanguageModelingData,
    LitCausalLM,
    LitPretrained,
    LitSeq2Seq,
    SequencePairData,
    TransformerConfig,
    WarmupConstant,
)
from lit_transformer.errors import UsageError

STEPS = 30
CONFIG = TransformerConfig(
    vocab_size=256, max_length=16, d_model=16, n_layers=2, n_heads=2, bias=False,  # of a key: noise
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip


class Losses(Callback):
    """The mean loss of each step over its micro-batches and ranks; and the weights at the end."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.setdefault(self.step, []).append(float(outputs["loss"]) / trainer.accumulate_grad_batches)

    def on_train_end(self, trainer, pl_module):
        named = pl_module.named_parameters()
        self.weights = {name: whole(trainer, p).double().abs().sum().item() for name, p in named}


class Task(LitCausalLM):
    """Training in which something happens: a loss that is not a number on one rank, a wild batch, damaged weights."""

    trouble = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        last = self.global_rank == self.trainer.world_size - 1
        if (self.trouble, self.global_step) == ("nan", 12) and last and torch.is_grad_enabled():
            loss = loss * float("nan")
        if (self.trouble, self.global_step) == ("wild", 20):
            loss = loss * 1e4
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.trouble, self.global_step) == ("damage", 20):
            self.trouble = None  # once: the data after a rollback is new
            for part in parts(self.trainer, self):
                part.data.mul_(8)


def parts(trainer, module):
    """What a rank has of the weights, in all copies that training goes on from."""
    parameters = list(module.parameters())
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        zero = trainer.model.optimizer
        if trainer.strategy.zero_stage_3:
            zero._partition_all_parameters()  # what is gathered is a copy, too
            return [p.ds_tensor for p in parameters] + zero.fp32_partitioned_groups_flat
        return [p.data for p in parameters] + zero.single_partition_of_fp32_groups
    return [p.data.to_local() if isinstance(p, DTensor) else p.data for p in parameters]


def whole(trainer, parameter):
    """All of a parameter, on every rank."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def strategy_of(name):
    """``zero2_offload`` is ZeRO-2 with its optimizer on the CPU; other names are Lightning's."""
    found = re.fullmatch(r"zero(\d)(_offload)?", name)
    return CPUDeepSpeed(int(found[1]), bool(found[2])) if found else "auto" if name == "single" else name


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
    losses, logger = Losses(), MemoryLogger()
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(
        strategy=strategy_of(strategy), devices=devices, max_steps=steps, max_epochs=-1,
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
        "weights": losses.weights,
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


COMBINATIONS = {
    f"{precision}, {accumulate}, {clip}": {"precision": precision, "accumulate": accumulate, "clip": clip, "steps": 12}
    for precision in ("32-true", "bf16-mixed")
    for accumulate in (1, 2)
    for clip in (None, 0.5)
}


class WholeGradients(Callback):
    """Compares the norm of each parameter's gradient, as callbacks share it, with that of DeepSpeed's whole one."""

    def __init__(self):
        self.differences = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not trainer.model.is_gradient_accumulation_boundary():
            return
        from deepspeed.utils import safe_get_full_grad

        facts = facts_of(trainer).gradients(trainer, optimizer)
        squares = facts.norms.square()
        torch.distributed.all_reduce(squares)
        found = (squares / trainer.world_size).sqrt()
        whole = torch.stack([safe_get_full_grad(parameter).float().norm() for parameter in facts.parameters])
        self.differences.append(((found - whole).abs() / whole).max().item())


def whole_gradients(folder, text, strategy):
    """The largest relative difference of a gradient's norm, with accumulation."""
    torch.manual_seed(0)
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    compare = WholeGradients()
    trainer = make_trainer(
        strategy=strategy_of(strategy), devices=2, max_steps=3, accumulate_grad_batches=2, limit_val_batches=0,
        default_root_dir=folder, callbacks=[compare],
    )  # fmt: skip
    trainer.fit(LitCausalLM(CONFIG, schedule=None), data)
    return compare.differences


def started_from(folder, text, strategy, checkpoint):
    """The loss of the first step with the weights of a file, and of the second, which the optimizer's copy makes."""
    torch.manual_seed(0)
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    task = LitCausalLM(CONFIG, partial(torch.optim.SGD, lr=0.0), schedule=None, init_from=checkpoint)
    losses = Losses()
    trainer = make_trainer(
        strategy=strategy_of(strategy), devices=2, max_steps=2, limit_val_batches=0, default_root_dir=folder,
        callbacks=[losses],
    )  # fmt: skip
    trainer.fit(task, data)
    return [sum(values) for values in losses.found.values()]


def refused_by_deepspeed(folder, text, strategy):
    """What is said of what DeepSpeed does not have yet."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    plain = LitCausalLM(CONFIG, schedule=None)
    free = LitCausalLM(CONFIG, partial(ScheduleFreeAdamW, lr=1e-3), WarmupConstant(warmup=2))
    runs = {
        "autopsy": (plain, [NonFiniteAutopsy()], {}),
        "clipping": (plain, [AdaptiveGradientClipping(max_grad_norm=1.0)], {}),
        "histograms": (plain, [ParameterStatsLogger(histograms=True)], {}),
        "schedule_free": (free, [], {}),
        "window": (plain, [], {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 2}),
    }
    found = {}
    for name, (task, callbacks, more) in runs.items():
        options = {"max_steps": 1, "limit_val_batches": 0, "default_root_dir": folder} | more
        try:
            make_trainer(strategy=strategy_of(strategy), devices=2, callbacks=callbacks, **options).fit(task, data)
        except (UsageError, SetupError) as error:
            found[name] = str(error)
    return found


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


def main(out, strategy, text, what, checkpoint):
    """Write what each case gives on this rank, and a resumed run."""
    if what == "combinations":
        found = {name: fit(out / name, text, strategy, **case) for name, case in COMBINATIONS.items()}
    else:
        found = {name: fit(out / name, text, strategy, **case) for name, case in CASES.items()}
        found["resumed"] = fit(out / "resumed", text, strategy, resume=str(out / "plain" / "step=10.ckpt"))
    if strategy == "fsdp2":
        found["refused"] = refused(out / "refused", text)
    if strategy.startswith("zero") and what == "cases":
        found["whole_gradients"] = whole_gradients(out / "whole_gradients", text, strategy)
        found["started_from"] = started_from(out / "started_from", text, strategy, checkpoint)
        found["refused"] = refused_by_deepspeed(out / "refused", text, strategy)
    (out / f"{strategy}_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
