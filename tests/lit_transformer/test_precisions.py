"""Every precision: what needs fp32 has it, and what is measured is what fp32 would measure."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from helpers import MemoryLogger
from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    ExactResume,
    GradientNormLogger,
    LossSpikeRecovery,
    ParameterStatsLogger,
)
from lit_transformer import LitCausalLM, LitClassifier
from lit_transformer.distillation import Distillation
from lit_transformer.nn.attention import attend
from lit_transformer.nn.norm import make_head_norm, make_norm
from lit_transformer.nn.positions import SinusoidalPositions
from lit_transformer.objectives import ClassObjective, TokenObjective
from tiny_task import TINY, Blocks, trainer

HALVES = [torch.bfloat16, torch.float16]
PLAIN = replace(
    TINY, attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0, qk_norm=True, norm="rmsnorm",
    positions="rotary",
)  # fmt: skip


def assert_rounded_once(low, exact):
    """What was computed in fp32 and then rounded is at most one place of the last digit away."""
    assert low.dtype != torch.float32
    step = torch.finfo(low.dtype).eps * exact.abs().clamp(min=torch.finfo(low.dtype).smallest_normal)
    assert bool(((low.float() - exact).abs() <= step).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("make", [make_norm, make_head_norm])
def test_norms(make, norm, dtype):
    """In fp16 the squares alone would be infinite, in bf16 a sum over 512 numbers would stop growing."""
    low = make(replace(TINY, d_model=1024, n_heads=2, norm=norm, qk_norm=True, bias=False)).to(dtype)
    x = (torch.randn(20, low.weight.numel(), generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    exact = type(low)(low.weight.numel(), eps=low.eps)
    assert_rounded_once(low(x), exact(x.float()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_waves_take_the_dtype_of_what_they_are_added_to(dtype):
    """ZeRO-3 has parameters in half precision, and leaves the table of waves as it is."""
    positions = SinusoidalPositions(300, 16)
    x = torch.randn(2, 300, 16).to(dtype)
    assert positions.wave.dtype == torch.float32
    assert_rounded_once(positions(x), 4 * x.float() + positions.wave.to(dtype).float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mask", ["causal", None, "padding"])
def test_attention(mask, dtype):
    """Softmax over 512 keys: weights are rounded for the product with values, their sum is not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 512, 16, generator=generator).to(dtype) for _ in range(3))
    if mask == "padding":
        mask = (torch.arange(512) < 400).expand(2, 1, 512, 512)
    low, exact = attend(4 * q, k, v + 1, mask), attend(4 * q.float(), k.float(), (v + 1).float(), mask)
    assert low.dtype == dtype
    assert (low.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_losses_are_those_of_the_logits_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 3000, generator=generator) * 8).to(dtype)
    targets = torch.randint(3000, (3, 5), generator=generator)
    weights = torch.tensor([1.0, 2.0, 0.5])
    token, single = TokenObjective(label_smoothing=0.1, z_loss=1e-3), ClassObjective(3000, z_loss=1e-3)
    several = ClassObjective(3000, multi_label=True)
    for objective, said, wanted in (
        (token, logits, targets),
        (single, logits[:, 0], targets[:, 0]),
        (several, logits[:, 0], targets % 2 @ torch.ones(5, 3000, dtype=torch.long) % 2),
    ):
        for weighted in (None, weights):
            loss = objective.loss(said, wanted, weighted)
            assert loss.dtype == torch.float32
            assert loss == objective.loss(said.float(), wanted, weighted)
        objective.update(said, wanted)
        for metric in objective.metrics().values():
            assert metric.compute().dtype == torch.float32
    taught = Distillation("teacher").divergence(logits, logits.flip(-1), targets >= 0)
    assert taught == Distillation("teacher").divergence(logits.float(), logits.float().flip(-1), targets >= 0)


class Classes(LightningDataModule):
    """Random ids, whose first is the class."""

    def train_dataloader(self):
        ids = torch.randint(3, (24, 8), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "targets": row[0]} for row in ids], batch_size=4)


def fit(folder, kind, precision, **options):
    """What is logged in six steps, by step, and the trainer."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, **options)
    if kind == "causal":
        task, data = LitCausalLM(PLAIN, optimizer, None, label_smoothing=0.1, z_loss=1e-4), Blocks()
    else:
        task, data = LitClassifier(PLAIN, num_labels=3, optimizer=optimizer, schedule=None), Classes()
    how = {"precision": precision}
    if precision == "scaler":
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
    logger = MemoryLogger()
    monitors = GradientNormLogger, ParameterStatsLogger, AttentionEntropyMonitor, DeadNeuronDetector
    run = trainer(
        folder, logger=logger, log_every_n_steps=1, limit_val_batches=0, **how,
        callbacks=[
            *(monitor(1) for monitor in (*monitors, ActivationStatsMonitor)), ExactResume(),
            LossSpikeRecovery(snapshot_every_n_steps=3),
        ],
    )  # fmt: skip
    run.fit(task, data)
    found = {}
    for step, metrics in logger.calls:
        found.setdefault(step, {}).update({key: float(value) for key, value in metrics.items()})
    return found, run


# How far losses and norms may be off after a few steps: the roundings of 11 and of 8 bits. Norms of updates in bf16
# are coarser, which is what rounding does to them.
ROUNDINGS = [
    ("scaler", 2e-3),
    ("bf16-mixed", 1.5e-2),
    ("bf16-true", 2e-2),
    ("16-true", 0.1),
]  # gradients of fp16 underflow


@pytest.mark.parametrize(("precision", "rounding"), ROUNDINGS)
@pytest.mark.parametrize("kind", ["causal", "classes"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of RMSNorm under autocast
def test_what_is_measured_is_what_fp32_measures(kind, precision, rounding, tmp_path):
    eps = 1e-4 if precision == "16-true" else 1e-8  # which is 0 in fp16
    exact, _ = fit(tmp_path / "32", kind, "32-true", eps=eps)
    found, run = fit(tmp_path / "low", kind, precision, eps=eps)
    assert found.keys() == exact.keys()
    for step in range(3):
        assert found[step].keys() == exact[step].keys()
        for key, value in exact[step].items():
            if key.startswith(("train/loss", "grad_norm/", "param_norm/", "attention_entropy/")):
                assert found[step][key] == pytest.approx(value, rel=rounding, abs=rounding / 10), (step, key)
            assert math.isfinite(found[step][key])
    states = {k: v for state in run.optimizers[0].state.values() for k, v in state.items()}
    stored = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert states["exp_avg"].dtype == next(run.lightning_module.parameters()).dtype == stored
    assert states["step"].dtype == torch.float32  # in bf16 it would stop at 256
    if precision == "scaler":
        assert run.precision_plugin.scaler.get_scale() == 1024.0
        assert run.optimizers[0].param_groups[0]["fused"]


def test_what_lightning_refuses_it_says():
    with pytest.raises(ValueError, match=r"does not support .*16-mixed.*Choose a different precision among: 32-true"):
        Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", precision="16-mixed")
