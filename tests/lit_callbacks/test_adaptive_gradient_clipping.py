import itertools
import math
import random

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from helpers import MemoryLogger, TinyLM, Tokens, TwoOptimizers, assert_identical, snapshot
from lit_callbacks import GradientNormLogger, NonFiniteGuard, SetupError
from lit_callbacks._z_score import ZScoreThreshold
from lit_callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping

# Gradient norms, in 64ths, and what is left of those that https://github.com/bluorion-com/ZClip clips with its defaults
# at commit 584ce4f, file zclip/zclip.py: the norm of the gradient of a float64 parameter after `ZClip.step`, by step.
NORMS = [
    61, 62, 59, 61, 62, 70, 63, 56, 58, 56, 55, 57, 57, 57, 57, 61, 58, 75, 55, 53, 53, 57, 53, 48, 54, 52, 49, 50, 50,
    51, 200, 51, 55, 48, 48, 49, 52, 47, 52, 45, 1000, 1500, 45, 46, 48, 48, 47, 80, 72, 46, 45, 48, 68, 300, 46, 44,
    42, 20, 42, 41,
]  # fmt: skip
ZCLIP = {
    5: 0.9999990857151216, 17: 0.999999146667395, 30: 0.9162276537786593, 40: 0.8694447788382117,
    41: 0.8681713921893404, 47: 0.9925926700737413, 48: 0.9999991111119013, 52: 0.9999990588244153,
    53: 0.8727290937268422,
}  # fmt: skip
ZCLIP_WITHOUT_MAX_GRAD_NORM = {
    30: 0.9162276537786593, 40: 0.8694447788382117, 41: 0.8681713921893404, 47: 0.9925926700737413,
    48: 1.073063932871607, 53: 0.8727290937268422,
}  # fmt: skip
ZCLIP_MEAN, ZCLIP_VARIANCE = 0.8126923013466858, 0.020928863098014047


class Given(LightningModule):
    """One float64 weight whose gradient is the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Norms(Callback):
    """The norm of the gradient at this place in the list of callbacks, by torch, and the dtypes it is made of."""

    def __init__(self):
        self.norms = {}
        self.dtypes = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [
            p.grad.to_dense() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.norms[trainer.global_step] = torch.nn.utils.get_total_norm(gradients).item()
        self.dtypes |= {gradient.dtype for gradient in gradients}


class Uneven(Tokens):
    """Some samples weigh a thousand times as much as others."""

    def __init__(self, heavy, faults=None):
        super().__init__(64, faults)
        self.heavy = heavy

    def __getitem__(self, index):
        return super().__getitem__(index) | ({"loss_factor": 1000.0} if index in self.heavy else {})


def uneven_loader(heavy=(), faults=None, without=()):
    """Sixteen batches of four, in order, `without` some of them; `heavy` are samples."""
    batches = [list(range(4 * i, 4 * i + 4)) for i in range(16) if i not in without]
    return DataLoader(Uneven(heavy, faults), batch_sampler=batches)


def fit(make_trainer, callbacks, data, options=None, module=TinyLM, **trainer_options):
    torch.manual_seed(0)
    module, logger = module(**options or {}), MemoryLogger()
    trainer = make_trainer(**{"max_epochs": 1, "callbacks": callbacks, "logger": logger, **trainer_options})
    trainer.fit(module, data)
    return snapshot(module, trainer), logger, trainer


@pytest.mark.parametrize(
    ("max_grad_norm", "clipped"), [(1.0, ZCLIP), (math.inf, ZCLIP_WITHOUT_MAX_GRAD_NORM)], ids=["default", "inf"]
)
def test_clips_to_the_norms_of_zclip(make_trainer, max_grad_norm, clipped):
    given = torch.tensor(NORMS, dtype=torch.float64) / 64
    clipping, after = AdaptiveGradientClipping(max_grad_norm=max_grad_norm), Norms()
    _, logger, _ = fit(make_trainer, [clipping, after], DataLoader(given, batch_size=1), module=Given)
    expected = dict(enumerate(given.tolist())) | clipped
    assert len(after.norms) == 60
    assert after.norms == pytest.approx(expected, rel=1e-12)
    state = clipping.state_dict()
    assert (state["mean"], state["variance"]) == pytest.approx((ZCLIP_MEAN, ZCLIP_VARIANCE), rel=1e-12)
    coefficients = logger.values("grad_norm/clip_coefficient")
    assert list(coefficients) == [0, 30, 40, 41, 47, 48, 50, 53]  # 0 and 50 are due, the others are outliers
    assert coefficients == pytest.approx({step: expected[step] / given[step].item() for step in coefficients})
    thresholds = logger.values("grad_norm/threshold")
    assert thresholds[0] == max_grad_norm
    assert all(min(clipped[step], 1) < thresholds[step] < given[step] for step in (30, 40, 41, 53))


def test_two_steps_of_the_averages_by_hand():
    series = ZScoreThreshold(alpha=0.5, z_threshold=2.5, warmup_steps=2)
    assert (series.ready, series.limit, series.z_score(9.0), series.threshold(9.0)) == (False, math.inf, 0.0, 9.0)
    series.update(1.0)
    series.update(3.0)
    assert series.ready
    assert series.state_dict() == {"first": [1.0, 3.0], "in_a_row": 0, "mean": 2.0, "variance": 1.0}
    assert series.limit == pytest.approx(4.5, rel=1e-5)

    series.update(4.0)  # z is 2, so all of it: mean (2 + 4) / 2, variance (1 + (4 - 3)^2) / 2
    assert series.state_dict() == {"first": [1.0, 3.0], "in_a_row": 0, "mean": 3.0, "variance": 1.0}

    assert series.z_score(13.0) == pytest.approx(10, rel=1e-5)
    assert series.threshold(13.0) == pytest.approx(3.625, rel=1e-5)  # 3 + 1 * 2.5 * 2.5 / 10
    series.update(13.0)
    assert series.state_dict()["mean"] == pytest.approx(3.3125, rel=1e-5)
    assert series.state_dict()["variance"] == pytest.approx(0.5 + 0.5 * 0.3125**2, rel=1e-5)


def test_a_norm_that_jumps_and_stays_there_is_accepted_after_as_many_steps_as_a_warm_up():
    series, generator = ZScoreThreshold(), random.Random(0)
    norms = [math.exp(generator.gauss(0, 0.3)) * (1 if step < 100 else 10) for step in range(200)]
    clipped = []
    for step, norm in enumerate(norms):
        if series.z_score(norm) > series.z_threshold:
            clipped.append(step)
        series.update(norm)
    assert [step for step in clipped if 100 <= step < 150] == list(range(100, 125))
    assert len([step for step in clipped if step >= 150]) <= 3


@pytest.mark.parametrize("values", [[1.0], [1.0, 3.0, 4.0]], ids=["warm-up", "later"])
def test_what_is_not_finite_is_not_learnt(values):
    series = ZScoreThreshold(warmup_steps=2)
    for value in values:
        series.update(value)
    before = series.state_dict()
    for value in (math.nan, math.inf, -math.inf):
        series.update(value)
    assert series.state_dict() == before


def test_an_infinite_score_leaves_clipping_by_norm():
    series = ZScoreThreshold(z_threshold=math.inf, warmup_steps=2)
    for value in (1.0, 1.0, 1.0, 2.0, 1e6):
        assert series.threshold(value) == value  # nothing is an outlier
        series.update(value)


def test_a_series_that_never_varied_has_finite_scores():
    series = ZScoreThreshold(warmup_steps=2)
    series.update(1.0)
    series.update(1.0)
    assert series.threshold(1.0) == 1.0
    assert series.threshold(2.0) == 1.0
    assert math.isfinite(series.z_score(2.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
    ids=str,
)
def test_the_clipped_gradient_has_the_threshold_for_a_norm(make_trainer, options):
    before, after = Norms(), Norms()
    clipping = AdaptiveGradientClipping(max_grad_norm=0.1, every_n_steps=1)
    _, logger, _ = fit(make_trainer, [before, clipping, after], uneven_loader(), **options)
    steps = 16 // options.get("accumulate_grad_batches", 1)
    assert min(before.norms.values()) > 0.1
    rel = 1e-2 if options.get("precision") == "bf16-true" else 1e-4
    assert after.norms == pytest.approx(dict.fromkeys(range(steps), 0.1), rel=rel)
    assert logger.values("grad_norm/threshold") == dict.fromkeys(range(steps), 0.1)
    factors = {step: after.norms[step] / before.norms[step] for step in range(steps)}
    assert logger.values("grad_norm/clip_coefficient") == pytest.approx(factors, rel=rel)


def test_gradients_of_several_types_are_scaled_alike(make_trainer):
    class Mixed(TinyLM):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, 16, sparse=True)
            self.head = nn.Linear(32, 32, dtype=torch.bfloat16)

        def make_optimizer(self, parameters):
            return torch.optim.SGD(parameters, lr=0.1)

    before, after = Norms(), Norms()
    callbacks = [before, AdaptiveGradientClipping(max_grad_norm=0.1), after]
    fit(make_trainer, callbacks, uneven_loader(), module=Mixed, precision="bf16-mixed")
    assert before.dtypes == {torch.float32, torch.bfloat16}
    assert min(before.norms.values()) > 0.1
    assert after.norms == pytest.approx(dict.fromkeys(range(16), 0.1), rel=1e-2)


def test_an_exploding_batch_does_little_harm(make_trainer):
    def run(callbacks, heavy=(40,)):
        options = {"optimizer": torch.optim.SGD, "lr": 0.5}
        weights, logger, _ = fit(make_trainer, callbacks, uneven_loader(heavy), options)
        module = TinyLM()
        module.load_state_dict(weights[0])
        batches = list(uneven_loader())
        return sum(module.loss(batch).item() for batch in batches) / len(batches), logger

    before, after = Norms(), Norms()
    clipping = AdaptiveGradientClipping(max_grad_norm=math.inf, warmup_steps=5)
    clipped, logger = run([before, clipping, after])
    usual = [norm for step, norm in before.norms.items() if step < 10]
    assert before.norms[10] > 50 * max(usual)
    assert after.norms[10] < 1.5 * max(usual)
    assert logger.values("grad_norm/clip_coefficient")[10] < 0.02
    healthy, _ = run([], heavy=())
    ruined, _ = run([])
    assert clipped < healthy + 0.1
    assert not ruined < healthy + 1


def test_other_callbacks_see_the_norms_before_and_after(make_trainer):
    before, after = Norms(), Norms()
    clipping = AdaptiveGradientClipping(max_grad_norm=0.5, warmup_steps=5)
    callbacks = [before, clipping, GradientNormLogger(every_n_steps=1), after]
    _, logger, _ = fit(make_trainer, callbacks, uneven_loader(heavy=[40]))
    assert logger.values("grad_norm/total") == pytest.approx(before.norms, rel=1e-5)
    assert logger.values("grad_norm/clipped") == pytest.approx(after.norms, rel=1e-4)
    assert after.norms[10] < before.norms[10] / 50


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("turned_round", [False, True])
def test_a_step_that_the_guard_skips_leaves_no_trace(make_trainer, fault, turned_round):
    def run(**data):
        clipping = AdaptiveGradientClipping(max_grad_norm=0.5, warmup_steps=4)
        callbacks = [clipping, NonFiniteGuard()]
        result, logger, trainer = fit(
            make_trainer, callbacks[::-1] if turned_round else callbacks, uneven_loader(**data)
        )
        return result, clipping.state_dict(), logger, trainer

    poisoned, state, logger, trainer = run(heavy=[40], faults={9: fault, 29: fault})
    clean, clean_state, *_ = run(heavy=[40], without=[2, 7])
    assert trainer.callback_metrics["loss_spike/skipped_steps"] == 2
    assert_identical(poisoned, clean)
    assert state == clean_state
    assert logger.values("grad_norm/clip_coefficient")[10] < 0.1


def test_without_a_guard_what_is_not_finite_is_left_as_it_is(make_trainer):
    clipping, after = AdaptiveGradientClipping(max_grad_norm=0.1, warmup_steps=4, every_n_steps=1), Norms()
    _, logger, _ = fit(make_trainer, [clipping, after], uneven_loader(faults={40: "nan"}))
    assert math.isnan(after.norms[10])
    assert list(logger.values("grad_norm/threshold")) == list(range(10))
    assert all(math.isfinite(clipping.state_dict()[key]) for key in ("mean", "variance"))


def test_a_finite_gradient_of_an_infinite_loss_is_clipped_and_not_learnt(make_trainer):
    class Infinite(TinyLM):
        def loss(self, batch):
            return super().loss(batch) + (math.inf if self.global_step == 6 else 0)

    clipping, after = AdaptiveGradientClipping(max_grad_norm=0.1), Norms()
    fit(make_trainer, [clipping, after], uneven_loader(), module=Infinite)
    assert after.norms[6] == pytest.approx(0.1, rel=1e-4)
    assert len(clipping.state_dict()["first"]) == 15


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says it once in a process
def test_a_step_without_a_loss_is_not_learnt(make_trainer):
    class Silent(TinyLM):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else self.loss(batch)

    clipping = AdaptiveGradientClipping()
    fit(make_trainer, [clipping], uneven_loader(), module=Silent)
    first = clipping.state_dict()["first"]
    assert len(first) == 15
    assert min(first) > 0


def test_the_order_in_which_they_are_passed_does_not_matter(make_trainer):
    results = []
    for order in itertools.permutations(range(3)):
        clipping = AdaptiveGradientClipping(max_grad_norm=0.5, warmup_steps=4)
        three = [GradientNormLogger(every_n_steps=1), clipping, NonFiniteGuard()]
        data = uneven_loader(heavy=[40], faults={29: "gradient"})
        with pytest.warns(UserWarning, match="the gradient is not finite"):
            result, logger, trainer = fit(make_trainer, [three[i] for i in order], data)
        assert [callback for callback in trainer.callbacks if callback in three] == three
        results.append((result, clipping.state_dict(), logger.values("grad_norm/clipped")))
    for result, state, clipped in results[1:]:
        assert_identical(result, results[0][0])
        assert (state, clipped) == results[0][1:]


@pytest.mark.parametrize("warmup_steps", [12, 20])
def test_a_resumed_run_clips_as_the_uninterrupted_one(make_trainer, tmp_path, warmup_steps):
    def run(epochs, **options):
        clipping = AdaptiveGradientClipping(max_grad_norm=math.inf, warmup_steps=warmup_steps)
        trainer = make_trainer(max_epochs=epochs, callbacks=[clipping], logger=MemoryLogger())
        module = TinyLM()
        trainer.fit(module, uneven_loader(heavy=[60]), weights_only=True, **options)
        return snapshot(module, trainer), clipping.state_dict(), trainer

    whole, state, uninterrupted = run(2)
    assert uninterrupted.logger.values("grad_norm/clip_coefficient")[31] < 0.3
    torch.manual_seed(0)
    *_, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_state, trainer = run(2, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 32
    assert_identical(resumed, whole)
    assert resumed_state == state


def test_loading_leaves_its_argument_alone(make_trainer):
    clipping = AdaptiveGradientClipping()
    state = {"first": [1.0], "in_a_row": 0, "mean": 1.0, "variance": 0.0}
    clipping.load_state_dict(state)
    fit(make_trainer, [clipping], uneven_loader())
    assert state == {"first": [1.0], "in_a_row": 0, "mean": 1.0, "variance": 0.0}
    assert len(clipping.state_dict()["first"]) == 17


def scaled(**options):
    scaler = torch.amp.GradScaler("cpu", **options)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


def test_the_scale_of_a_grad_scaler_is_taken_out_and_its_search_left_alone(make_trainer):
    precision = scaled(init_scale=2.0**40)
    clipping, after = AdaptiveGradientClipping(max_grad_norm=0.1), Norms()
    fit(make_trainer, [clipping, after], uneven_loader(), max_epochs=3, **precision)
    overflown = [step for step, norm in after.norms.items() if not math.isfinite(norm)]
    assert precision["plugins"][0].scaler.get_scale() < 2.0**40
    assert overflown == list(range(len(overflown)))
    assert 0 < len(overflown) < 40
    clipped = [norm for step, norm in after.norms.items() if step not in overflown]
    assert clipped == pytest.approx([0.1] * len(clipped), rel=1e-3)


@pytest.mark.parametrize(
    ("callbacks", "module", "options", "trainer_options", "reason"),
    [
        (
            1,
            TinyLM,
            {},
            {"gradient_clip_val": 1.0},
            "gradient_clip_val=1.0 would clip twice. Leave gradient_clip_val out",
        ),
        (1, TwoOptimizers, {}, {}, "needs automatic optimization.*or leave the callback out"),
        (1, TinyLM, {"optimizer": torch.optim.LBFGS}, {}, "cannot clip for LBFGS.*Use another optimizer"),
        (1, TinyLM, {"fused": True}, scaled(), "fused AdamW under a GradScaler.*Use fused=False"),
        (2, TinyLM, {}, {}, "Two AdaptiveGradientClipping.*Keep one of them"),
    ],
    ids=["gradient_clip_val", "manual", "lbfgs", "fused and scaler", "two"],
)
def test_what_it_cannot_clip_for_is_refused(make_trainer, callbacks, module, options, trainer_options, reason):
    all_different = [AdaptiveGradientClipping(warmup_steps=2 + i) for i in range(callbacks)]
    with pytest.raises(SetupError, match=reason):
        fit(make_trainer, all_different, uneven_loader(), options, module, **trainer_options)


def test_a_fused_optimizer_alone_is_fine(make_trainer):
    after = Norms()
    fit(make_trainer, [AdaptiveGradientClipping(max_grad_norm=0.1), after], uneven_loader(), {"fused": True})
    assert after.norms == pytest.approx(dict.fromkeys(range(16), 0.1), rel=1e-4)
