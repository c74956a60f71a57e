"""Run by test_strategies.py in two processes, and imported by it: the same training under any strategy."""

import itertools
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from pytorch_optimizer import ScheduleFreeAdamW
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from cpu_deepspeed import CPUDeepSpeed
from helpers import MemoryLogger, make_trainer
from lit_callbacks import (
    ActivationStatsMonitor,
    AdaptiveGradientClipping,
    AttentionEntropyMonitor,
    Dashboard,
    DeadNeuronDetector,
    EarlyStoppingWithRestore,
    ExactResume,
    GradientNormLogger,
    GradualUnfreezing,
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
    TransformerConfig,
    WarmupConstant,
)
from lit_transformer.commands.consolidate import whole as consolidated
from lit_transformer.errors import UsageError
from lit_transformer.strategies.deferred import deferred_weights

STEPS = 40
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


class Bytes(Callback):
    """What this rank holds at the end of the last step, and in each of recovery's snapshots."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        def size(tensors):
            return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
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

    trouble = ""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        step = batch_idx // self.trainer.accumulate_grad_batches  # also when it is run again
        if "nan" in self.trouble and step == 12 and self.global_rank == self.trainer.world_size - 1:
            loss = loss * float("nan")
        if "wild" in self.trouble and step == 26:
            loss = loss * 1e4
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if "damage" in self.trouble and self.global_step == 30:
            self.trouble = ""  # once: the data after a rollback is new
            scale(self.trainer, self.model.final_norm.weight, -8)


def scale(trainer, parameter, factor):
    """Multiply a parameter, in all copies that training goes on from."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        (parameter.data.to_local() if isinstance(parameter, DTensor) else parameter.data).mul_(factor)
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, factor * safe_get_full_fp32_param(parameter))
    if trainer.strategy.zero_stage_3:
        trainer.model.optimizer._partition_all_parameters()  # what is gathered is a copy, too
        parameter.ds_tensor.mul_(factor)
    else:
        parameter.data.mul_(factor)


class CPUFSDP(FSDPStrategy):
    """Lightning allows FSDP1 on GPUs alone, and torch asks for the device; on CPUs, it saves in parts only."""

    def __init__(self, state_dict_type="sharded"):
        super().__init__(state_dict_type=state_dict_type)

    def _setup_model(self, model):
        init = FullyShardedDataParallel.__init__

        def on_cpu(self, *arguments, **options):
            init(self, *arguments, **options | {"device_id": torch.device("cpu")})

        with mock.patch.object(FullyShardedDataParallel, "__init__", on_cpu):
            return super()._setup_model(model)


STRATEGIES = {  # devices, parts of a batch, strategy
    "single": (1, 1, lambda: "auto"),
    "ddp": (2, 2, lambda: "ddp"),
    "fsdp2": (2, 2, lambda: "fsdp2"),
    "tensor_parallel": (2, 1, lambda: "tensor_parallel"),
    "tensor_parallel_and_fsdp2": (4, 2, lambda: "tensor_parallel"),
    "fsdp": (2, 2, CPUFSDP),
    "zero1": (2, 2, lambda: CPUDeepSpeed(1)),
    "zero2": (2, 2, lambda: CPUDeepSpeed(2)),
    "zero3": (2, 2, lambda: CPUDeepSpeed(3)),
    "zero2_offload": (2, 2, lambda: CPUDeepSpeed(2, offload=True)),
    "zero3_offload": (2, 2, lambda: CPUDeepSpeed(3, offload=True)),
}


def as_on_the_command_line(strategy):
    """Models of a strategy that cuts them get their weights later."""
    return nullcontext() if strategy in ("single", "ddp") else deferred_weights()


def events(folder):
    """What recovery did: step and event."""
    lines = [json.loads(line) for path in folder.rglob("events.jsonl") for line in path.read_text().splitlines()]
    return [[line["step"], line["event"]] for line in lines if line["event"] in ("skip", "rollback", "stop")]


def weights(trainer, task):
    """The sum of the absolute values of each parameter, all of it, on every rank."""
    found = {}
    for name, parameter in task.named_parameters():
        total = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            from deepspeed.utils import safe_get_full_fp32_param

            total = safe_get_full_fp32_param(parameter)
        total = total.detach().double().abs().sum()
        if isinstance(trainer.strategy, FSDPStrategy):
            torch.distributed.all_reduce(total)
        found[name.replace("_fsdp_wrapped_module.", "")] = total.item()
    return found


def fit(folder, text, strategy, *, accumulate, clip, precision, trouble, steps=STEPS, resume=None, config=CONFIG):
    """Losses, logged metrics, events and weights of a run."""
    devices, parts, make_strategy = STRATEGIES[strategy]
    torch.manual_seed(0)
    with as_on_the_command_line(strategy):
        task = Task(config, partial(torch.optim.AdamW, lr=3e-3), schedule=None)
    task.trouble = trouble
    # The same global batch: one process takes in one micro-batch what two take in theirs.
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=8 // parts)
    losses, sizes, logger = Losses(), Bytes(), MemoryLogger()
    how, scaler = {"precision": precision}, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    if precision == "16-mixed":  # of which Lightning makes bf16 on a CPU; the factor is raised now and then
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(
        strategy=make_strategy(), devices=devices, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=accumulate, gradient_clip_val=clip, limit_val_batches=0, logger=logger,
        enable_checkpointing=True, default_root_dir=folder, **how,
        callbacks=[
            losses, sizes, GradientNormLogger(5), ParameterStatsLogger(5), AttentionEntropyMonitor(5),
            DeadNeuronDetector(5), ActivationStatsMonitor(5), ThroughputLogger(5), ExactResume(), checkpoint,
            LossSpikeRecovery(snapshot_every_n_steps=5), Dashboard(every_n_steps=10),
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
        "weights": weights(trainer, task),
        "position": data.position(),
        "events": events(folder),
        "bytes": sizes.found,
        "scale": scaler.get_scale(),
    }


class Cell(NamedTuple):
    """One kind of training. In each, a rank's loss is not a number once, a batch is wild, and weights are damaged."""

    precision: str = "32-true"
    accumulate: int = 2
    clip: float | None = 0.5

    def __str__(self):
        return f"{self.precision}, {self.accumulate} batches a step, {'clipped' if self.clip else 'not clipped'}"

    def folder(self, out):
        return out / str(self).replace(", ", "_").replace(" ", "_")

    def run(self, out, text, strategy, **options):
        return fit(
            self.folder(out), text, strategy, precision=self.precision, accumulate=self.accumulate, clip=self.clip,
            trouble="nan wild damage", **options,
        )  # fmt: skip


GRID = [Cell(*values) for values in itertools.product(("32-true", "bf16-mixed", "16-mixed"), (1, 2), (None, 0.5))]


def cells(strategy):
    """Those that a CPU has: FSDP1 has a scaler of its own, for GPUs, and DeepSpeed no fp16."""
    return [cell for cell in GRID if cell.precision != "16-mixed" or not (strategy == "fsdp" or "zero" in strategy)]


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
        strategy=STRATEGIES[strategy][2](), devices=2, max_steps=3, accumulate_grad_batches=2, limit_val_batches=0,
        default_root_dir=folder, callbacks=[compare],
    )  # fmt: skip
    trainer.fit(LitCausalLM(CONFIG, schedule=None), data)
    return compare.differences


def adaptively_clipped(folder, text, strategy):
    """What a run is like whose gradients are clipped by what was usual: losses, coefficients, weights."""
    devices, parts, make_strategy = STRATEGIES[strategy]
    torch.manual_seed(0)
    with as_on_the_command_line(strategy):
        task = Task(CONFIG, partial(torch.optim.AdamW, lr=3e-3), schedule=None)
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=8 // parts)
    losses, logger = Losses(), MemoryLogger()
    clipping = AdaptiveGradientClipping(z_threshold=0.2, max_grad_norm=0.6, warmup_steps=2, every_n_steps=1)
    trainer = make_trainer(
        strategy=make_strategy(), devices=devices, max_steps=8, accumulate_grad_batches=2, limit_val_batches=0,
        logger=logger, default_root_dir=folder, callbacks=[losses, clipping, GradientNormLogger(1)],
    )  # fmt: skip
    trainer.fit(task, data)
    keys = "grad_norm/total", "grad_norm/clipped", "grad_norm/clip_coefficient", "grad_norm/threshold"
    logged = {f"{step} {key}": float(values[key]) for step, values in logger.calls for key in keys if key in values}
    return {"losses": {k: sum(v) for k, v in losses.found.items()}, "logged": logged, "weights": weights(trainer, task)}


def refused_by_deepspeed(folder, text, strategy):
    """What is said of what DeepSpeed does not have yet."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    plain = LitCausalLM(CONFIG, schedule=None)
    free = LitCausalLM(CONFIG, partial(ScheduleFreeAdamW, lr=1e-3), WarmupConstant(warmup=2))
    runs = {
        "autopsy": (plain, [NonFiniteAutopsy()], {}),
        "histograms": (plain, [ParameterStatsLogger(histograms=True)], {}),
        "schedule_free": (free, [], {}),
        "window": (plain, [], {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 2}),
    }
    found = {}
    for name, (task, callbacks, more) in runs.items():
        options = {"max_steps": 1, "limit_val_batches": 0, "default_root_dir": folder} | more
        try:
            make_trainer(strategy=STRATEGIES[strategy][2](), devices=2, callbacks=callbacks, **options).fit(task, data)
        except (UsageError, SetupError) as error:
            found[name] = str(error)
    return found


def refused(folder, text, strategy):
    """What is said of what a strategy does not have yet."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    callbacks = {
        "autopsy": NonFiniteAutopsy(),
        "histograms": ParameterStatsLogger(histograms=True),
        "unfreezing": GradualUnfreezing(["*final_norm*"]),
        "early_stopping": EarlyStoppingWithRestore(),
        "schedule_free": Callback(),
    }
    found = {}
    for name, callback in callbacks.items():
        free = name == "schedule_free"
        optimizer = partial(ScheduleFreeAdamW, lr=1e-3) if free else torch.optim.AdamW
        task = LitCausalLM(CONFIG, optimizer, WarmupConstant(warmup=2) if free else None)
        trainer = make_trainer(
            strategy=STRATEGIES[strategy][2](), devices=2, max_steps=2, limit_val_batches=1, default_root_dir=folder,
            callbacks=[callback], num_sanity_val_steps=1,
        )  # fmt: skip
        try:
            trainer.fit(task, data)
        except (UsageError, SetupError) as error:
            found[name] = str(error)
    if strategy == "fsdp":
        task, options = LitCausalLM(CONFIG), {"devices": 2, "max_steps": 1, "default_root_dir": folder}
        make_trainer(strategy=CPUFSDP(), **options).validate(task, data)
        try:
            make_trainer(strategy=CPUFSDP(), **options).fit(task, data)
        except UsageError as error:
            found["second"] = str(error)
    return found


def started_from(folder, text, strategy, one_file):
    """The weights of a run that starts from those of a file, and does not move."""
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=4)
    with as_on_the_command_line(strategy):
        task = LitCausalLM(CONFIG, partial(torch.optim.SGD, lr=0.0), None, init_from=one_file)
    options = {"devices": 2, "max_steps": 1, "limit_val_batches": 0, "default_root_dir": folder}
    trainer = make_trainer(strategy=STRATEGIES[strategy][2](), **options)
    trainer.fit(task, data)
    return weights(trainer, task)


def resumed_part(whole):
    """The losses of a run that a resumed one should have."""
    return {step: loss for step, loss in whole["losses"].items() if 20 <= int(step) < 30}


def main(out, strategy, text, one_file, *numbers):
    """Write what some cells of the grid give on this rank, also resumed; and what is refused."""
    found, cells = {}, [GRID[int(number)] for number in numbers]
    first = cells[0]
    for cell in cells:
        whole = found[str(cell)] = cell.run(out, text, strategy)
        checkpoint = str(cell.folder(out) / "step=20.ckpt")
        whole["resumed"] = cell.run(out / "resumed", text, strategy, resume=checkpoint, steps=30)["losses"]
    if one_file:
        found["started_from"] = started_from(out / "started_from", text, strategy, one_file)
        found["adaptively_clipped"] = adaptively_clipped(out / "adaptively_clipped", text, strategy)
    if one_file and strategy in ("fsdp2", "tensor_parallel"):  # of the first cell, by one process
        found["from_one_file"] = first.run(out / "from_one_file", text, strategy, resume=one_file, steps=30)["losses"]
    if strategy == "tensor_parallel":
        dropout = replace(CONFIG, attention_dropout=0.1, ffn_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1)
        found["dropout"] = first.run(out / "dropout", text, strategy, config=dropout, steps=15)["weights"]
    if strategy in ("fsdp2", "tensor_parallel", "fsdp") and one_file:
        found["refused"] = refused(out / "refused", text, strategy)
    if strategy.startswith("zero"):
        contents = consolidated(cells[0].folder(out) / f"step={STEPS}.ckpt")
        found["consolidated"] = {k: v.double().abs().sum().item() for k, v in contents["state_dict"].items()}
        found["states"] = len(contents["optimizer_states"][0]["state"])
    if strategy == "zero2":
        found["refused"] = refused_by_deepspeed(out / "refused", text, strategy)
    if strategy in ("zero2", "zero3"):
        found["whole_gradients"] = whole_gradients(out / "whole_gradients", text, strategy)
    (out / f"{strategy}_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
