import json
import math
from fnmatch import fnmatch
from pathlib import Path

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
    with pytest.warns(UserWarning, match="step 2: the gradient is not finite; embedding.weight is the first"):
        _, logger, _ = fit(make_trainer, TinyLM(), max_steps=3, data=loader(faults={8: "nan"}))
    assert math.isnan(logger.values("grad_norm/total")[2])


def test_a_resumed_run_measures_the_same_steps(make_trainer, tmp_path):
    trainer, _, _ = fit(make_trainer, TinyLM(), max_epochs=1, data=loader(n_samples=12))
    trainer.save_checkpoint(tmp_path / "at_3.ckpt")
    logger = MemoryLogger()
    resumed = make_trainer(logger=logger, callbacks=[GradientNormLogger(every_n_steps=2)], max_epochs=3)
    resumed.fit(TinyLM(), loader(n_samples=12), ckpt_path=tmp_path / "at_3.ckpt", weights_only=True)
    assert list(logger.values("grad_norm/total")) == [4, 6, 8]


class Gradients(Callback):
    """Every parameter's gradient, before clipping and as the optimizer used it."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = {name: p.grad.double().clone() for name, p in pl_module.named_parameters()}
        optimizer.register_step_post_hook(self.after_step)
        self.module = pl_module

    def after_step(self, *args):
        self.after = {name: p.grad.double().clone() for name, p in self.module.named_parameters()}


def flat_norm(gradients, pattern="*"):
    return torch.cat([g.flatten() for name, g in gradients.items() if fnmatch(name, pattern)]).norm().item()


# Torch refuses to clip under a fused optimizer and a scaler.
@pytest.mark.parametrize(("scaled", "fused"), [(False, None), (False, True), (True, None)])
def test_groups_clipped_and_rms(make_trainer, scaled, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)] if scaled else []
    gradients, logger = Gradients(), MemoryLogger()
    norms = GradientNormLogger(groups=["layers", "kinds", "hidden.*", "parameters"])
    trainer = make_trainer(
        callbacks=[norms, gradients], logger=logger, max_steps=1, gradient_clip_val=0.1, plugins=plugins
    )
    trainer.fit(TinyLM(fused=fused), loader())
    ((_, values),) = logger.calls
    assert values["grad_norm/total"] == pytest.approx(flat_norm(gradients.before), rel=1e-5)
    assert values["grad_norm/clipped"] == pytest.approx(flat_norm(gradients.after), rel=1e-5)
    assert values["grad_norm/clipped"] == pytest.approx(0.1, rel=1e-4)
    elements = sum(g.numel() for g in gradients.before.values())
    assert values["grad_norm/rms"] == pytest.approx(flat_norm(gradients.before) / elements**0.5, rel=1e-5)
    patterns = {
        "layer_0": "blocks.0.*",
        "layer_1": "blocks.1.*",
        "attention_in": "blocks.*",
        "embedding": "embedding.*",
        "hidden__": "hidden.*",
        "head_weight": "head.weight",
    }
    for group, pattern in patterns.items():
        assert values[f"grad_norm/{group}"] == pytest.approx(flat_norm(gradients.before, pattern), rel=1e-5)
    assert values["grad_norm/nonfinite"] == values["grad_norm/exploding"] == 0


def test_clipped_under_a_fused_optimizer_and_a_scaler_is_unscaled(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1)], logger=logger, max_steps=3, plugins=[plugin])
    trainer.fit(TinyLM(fused=True), loader())
    for _, values in logger.calls:
        assert values["grad_norm/clipped"] == pytest.approx(values["grad_norm/total"], rel=1e-6)
        assert values["grad_norm/total"] < 10


class ClipsByItself(TinyLM):
    """Halves one parameter's gradient."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.head.weight.grad *= 0.5


class Meddles(Callback):
    """Zeroes one parameter's gradient."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.hidden.weight.grad.zero_()


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (TinyLM, {}),
        (TinyLM, {"gradient_clip_val": 0.05}),
        (TinyLM, {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}),
        (ClipsByItself, {}),
        (TinyLM, {"meddles": True}),
    ],
    ids=["nothing", "norm", "value", "the module's own", "a callback's"],
)
def test_clipped_is_what_the_optimizer_used_whoever_clipped(make_trainer, module, options):
    used = []

    class Recording(module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(
                lambda *_: used.append(flat_norm({n: p.grad.double() for n, p in self.named_parameters()}))
            )
            return optimizer

    options, logger = dict(options), MemoryLogger()
    others = [Meddles()] if options.pop("meddles", False) else []
    trainer = make_trainer(callbacks=[GradientNormLogger(1), *others], logger=logger, max_steps=3, **options)
    trainer.fit(Recording(), loader())
    assert list(logger.values("grad_norm/clipped").values()) == pytest.approx(used, rel=1e-4)


def test_frozen_parameters_are_in_no_group(make_trainer):
    module = TinyLM()
    module.blocks.requires_grad_(False)
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1)], logger=logger, max_steps=2)
    trainer.fit(module, loader())
    assert "grad_norm/layer_0" not in logger.calls[0][1]
    assert logger.calls[0][1]["grad_norm/vanishing"] == 0


class Scaled(TinyLM):
    """Multiplies the loss, and with it the gradient, step by step."""

    def __init__(self, factors, **options):
        super().__init__(lr=0.0, weight_decay=0.0, **options)
        self.factors = factors

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factors[self.global_step]


def alarms(trainer):
    path = Path(trainer.default_root_dir, "events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_gradient_that_explodes_is_flagged_and_twice_in_a_row_an_alarm(make_trainer):
    factors = [1.0] * 6 + [30.0] + [1.0] + [30.0] * 3 + [1.0]
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1, groups=["layers"])], logger=logger, max_steps=12)
    with pytest.warns(UserWarning, match="step 9: the gradient explodes in layer_0, layer_1: .* above 10 times"):
        trainer.fit(Scaled(factors), loader())
    flags = logger.values("grad_norm/exploding")
    assert [step for step, count in flags.items() if count == 2] == [6, 8, 9, 10]
    (alarm,) = alarms(trainer)
    assert (alarm["step"], alarm["alarm"], alarm["where"]) == (9, "gradient_exploding", ["layer_0", "layer_1"])


def test_a_gradient_that_vanishes_is_flagged_and_twice_in_a_row_an_alarm(make_trainer):
    factors = [1.0, 1e-9, 1.0, 1e-9, 1e-9, 1e-9]
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1, groups=["layers"])], logger=logger, max_steps=6)
    with pytest.warns(UserWarning, match="step 4: the gradient vanishes in layer_0, layer_1: .* below 1e-08"):
        trainer.fit(Scaled(factors), loader())
    assert list(logger.values("grad_norm/vanishing").values()) == [0, 2, 0, 2, 2, 2]
    assert [alarm["step"] for alarm in alarms(trainer)] == [4]


def test_the_share_and_the_first_parameter_that_are_not_finite(make_trainer):
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1)], logger=logger, max_steps=3)
    with pytest.warns(UserWarning, match=r"step 1: .* hidden\.weight is the first parameter") as seen:
        trainer.fit(TinyLM(), loader(faults={4: "gradient"}))
    shares = list(logger.values("grad_norm/nonfinite").values())
    assert shares[0] == 0
    assert shares[1] == pytest.approx(1 / 7)  # only hidden.weight; then its weights are NaN
    assert shares[2] > 0.5
    assert alarms(trainer)[0]["where"] == ["hidden.weight"]
    assert sum("is the first parameter" in str(w.message) for w in seen) == 1


def test_an_overflow_under_a_scaler_is_no_alarm(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[GradientNormLogger(1)], logger=logger, max_steps=2, plugins=[plugin])
    trainer.fit(TinyLM(), loader())
    assert logger.values("grad_norm/nonfinite")[0] > 0
    assert "grad_norm/clipped" not in logger.calls[0][1]
    assert alarms(trainer) == []


def test_a_resumed_logger_judges_by_the_past_it_had(make_trainer, tmp_path):
    module = Scaled([1.0] * 7 + [30.0] * 3)
    first = make_trainer(max_epochs=1, callbacks=[GradientNormLogger(1, groups=["layers"])])
    first.fit(module, loader(n_samples=28))
    first.save_checkpoint(tmp_path / "seven.ckpt")
    resumed = make_trainer(max_steps=10, callbacks=[GradientNormLogger(1, groups=["layers"])])
    with pytest.warns(UserWarning, match="step 8: the gradient explodes"):
        resumed.fit(module, loader(n_samples=28), ckpt_path=tmp_path / "seven.ckpt", weights_only=True)


class _WithAStranger(TinyLM):
    def configure_optimizers(self):
        self.__dict__["stranger"] = torch.nn.Parameter(torch.ones(3))  # which is no attribute of the module to torch
        return torch.optim.SGD([*self.parameters(), self.__dict__["stranger"]], lr=0.01)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.__dict__["stranger"] * 2).sum()


def test_a_parameter_that_is_not_of_the_module_counts_in_the_total(make_trainer):
    _, logger, reference = fit(make_trainer, _WithAStranger(), max_steps=1)
    logged = {key: value for _, metrics in logger.calls for key, value in metrics.items()}
    assert logged["grad_norm/total"] == pytest.approx(reference.norms[0], rel=1e-5)
