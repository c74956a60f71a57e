import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from helpers import MemoryLogger, TinyLM, TwoOptimizers, loader
from lit_callbacks import GradientNormLogger


class FlatNorm(Callback):
    """The reference: one float64 vector of all gradients of an optimizer, divided by a given factor."""

    def __init__(self, factor=1.0):
        self.factor = factor
        self.norms = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.flatten().double() for g in gradients])
        self.norms[trainer.global_step] = flat.norm().item() / self.factor


def fit(make_trainer, module, callbacks=(), data=None, **options):
    logger = MemoryLogger()
    reference = options.pop("reference", None) or FlatNorm()
    trainer = make_trainer(
        logger=logger, callbacks=[GradientNormLogger(every_n_steps=2), reference, *callbacks], **options
    )
    trainer.fit(module, data or loader())
    return trainer, logger, reference


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 4},
    ],
    ids=str,
)
def test_logs_the_norm_before_clipping_at_its_own_step(make_trainer, options):
    steps = 4 if "accumulate_grad_batches" in options else 7
    trainer, logger, reference = fit(make_trainer, TinyLM(dropout=0.1), max_steps=steps, **options)
    logged = logger.values("grad_norm/total")
    assert list(logged) == list(range(0, steps, 2))
    assert logged == pytest.approx({step: reference.norms[step] for step in logged}, rel=1e-5)
    assert trainer.callback_metrics["grad_norm/total"] == list(logged.values())[-1]


def test_accumulated_norm_is_that_of_one_large_batch(make_trainer):
    _, accumulated, _ = fit(make_trainer, TinyLM(), max_steps=3, accumulate_grad_batches=4, data=loader(batch_size=4))
    torch.manual_seed(0)
    _, large, _ = fit(make_trainer, TinyLM(), max_steps=3, data=loader(batch_size=16))
    assert list(accumulated.values("grad_norm/total")) == [0, 2]
    assert accumulated.values("grad_norm/total") == pytest.approx(large.values("grad_norm/total"), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_grad_scaler_is_taken_out(make_trainer, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    module = TinyLM(fused=fused)
    reference = FlatNorm(factor=1024.0 if fused else 1.0)
    _, logger, reference = fit(make_trainer, module, max_steps=5, plugins=[plugin], reference=reference)
    logged = logger.values("grad_norm/total")
    assert logged == pytest.approx({step: reference.norms[step] for step in (0, 2, 4)}, rel=1e-5)
    assert all(0.01 < norm < 10 for norm in logged.values())


def test_each_of_several_optimizers_gets_its_turn_and_key(make_trainer):
    _, logger, reference = fit(make_trainer, TwoOptimizers(), max_steps=8)
    first, second = logger.values("grad_norm/total_0"), logger.values("grad_norm/total_1")
    assert list(first) == [0, 2, 4, 6]
    assert list(second) == [1, 3, 5, 7]
    assert first | second == pytest.approx(reference.norms, rel=1e-5)


def test_a_non_finite_norm_is_logged_as_it_is(make_trainer):
    _, logger, _ = fit(make_trainer, TinyLM(), max_steps=3, data=loader(faults={8: "nan"}))
    assert math.isnan(logger.values("grad_norm/total")[2])


def test_a_resumed_run_measures_the_same_steps(make_trainer, tmp_path):
    trainer, _, _ = fit(make_trainer, TinyLM(), max_epochs=1, data=loader(n_samples=12))
    trainer.save_checkpoint(tmp_path / "at_3.ckpt")
    logger = MemoryLogger()
    resumed = make_trainer(logger=logger, callbacks=[GradientNormLogger(every_n_steps=2)], max_epochs=3)
    resumed.fit(TinyLM(), loader(n_samples=12), ckpt_path=tmp_path / "at_3.ckpt", weights_only=True)
    assert list(logger.values("grad_norm/total")) == [4, 6, 8]
