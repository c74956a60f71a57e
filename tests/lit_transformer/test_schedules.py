"""Every schedule against an implementation that nobody here wrote, or the formula of its paper."""

import math
import re
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ReduceLROnPlateau

from lit_transformer.optim import (
    Noam,
    WarmupConstant,
    WarmupCosine,
    WarmupCosineRestarts,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupPlateau,
    WarmupPolynomial,
    WarmupStableDecay,
)

TOTAL, WARMUP = 200, 20


def theirs(name, **specific):
    """Hugging Face's multipliers, step by step. Their warm-up begins with a step of learning rate 0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, WARMUP, TOTAL, scheduler_specific_kwargs=specific)
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("ours", "name", "specific"),
    [
        (WarmupConstant(WARMUP), "constant_with_warmup", {}),
        (WarmupLinear(WARMUP, 0.0), "linear", {}),
        (WarmupCosine(WARMUP, 0.0), "cosine", {}),
        (WarmupCosine(WARMUP, 0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (WarmupCosineRestarts(WARMUP, 0.0, cycles=3), "cosine_with_restarts", {"num_cycles": 3}),
        (WarmupPolynomial(WARMUP, 1e-7, power=2.0), "polynomial", {"lr_end": 1e-7, "power": 2.0}),
        (WarmupInverseSqrt(WARMUP), "inverse_sqrt", {}),
        (
            WarmupStableDecay(WARMUP, 0.1, decay=40, shape="cosine"),
            "warmup_stable_decay",
            {"num_decay_steps": 40, "min_lr_ratio": 0.1, "decay_type": "cosine"},
        ),
        (
            WarmupStableDecay(WARMUP, 0.0, decay=40, shape="linear"),
            "warmup_stable_decay",
            {"num_decay_steps": 40, "decay_type": "linear"},
        ),
        (
            WarmupStableDecay(WARMUP, 0.0, decay=40, shape="sqrt"),
            "warmup_stable_decay",
            {"num_decay_steps": 40, "decay_type": "1-sqrt"},
        ),
    ],
)
def test_equal_to_hugging_face(ours, name, specific):
    expected = theirs(name, **specific)
    found = [ours.multiplier(step, TOTAL) for step in range(TOTAL)]
    if "min_lr_ratio" not in specific:  # theirs then also begins there
        assert found[: WARMUP - 1] == pytest.approx(expected[1:WARMUP])
    assert found[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-12)


def test_restarts_are_those_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=50, eta_min=0.1)
    ours = WarmupCosineRestarts(0, 0.1, cycles=4)
    for step in range(TOTAL):
        assert ours.multiplier(step, TOTAL) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 16_000, 99_999])
def test_the_original_schedule_is_the_papers_formula(step):
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert Noam(4000, 512).multiplier(step - 1, 100_000) == pytest.approx(expected)


def test_the_original_schedule_peaks_where_the_paper_says():
    values = [Noam(40, 16).multiplier(step, 1000) for step in range(1000)]
    assert values.index(max(values)) == 39
    assert max(values) == pytest.approx((16 * 40) ** -0.5)


def test_the_floor_is_reached_and_stays():
    for schedule in (WarmupLinear, WarmupCosine, WarmupPolynomial, WarmupStableDecay, WarmupCosineRestarts):
        made = schedule(warmup=10, min_lr_ratio=0.2)
        assert made.multiplier(TOTAL, TOTAL) == pytest.approx(0.2), schedule
        assert made.multiplier(5 * TOTAL, TOTAL) == pytest.approx(0.2), schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosineRestarts(cycles=0), "cycles must be at least 1, got 0"),
        (lambda: WarmupPolynomial(power=0.0), "power must be above 0, got 0.0"),
        (lambda: WarmupStableDecay(decay=-0.5), "decay must be at least 0, got -0.5"),
        (lambda: WarmupStableDecay(shape="none"), "shape must be one of linear, cosine, sqrt, got 'none'"),
        (lambda: WarmupInverseSqrt(warmup=0), "warmup must be above 0"),
        (lambda: Noam(warmup=0), "warmup must be above 0"),
        (lambda: Noam(d_model=0), "d_model must be at least 1, got 0"),
        (lambda: WarmupPlateau(factor=1.0), "factor must be above 0 and below 1, got 1.0"),
        (lambda: WarmupPlateau(patience=-1), "patience must be at least 0, got -1"),
        (lambda: WarmupPlateau(min_lr=-1.0), "min_lr must be at least 0, got -1.0"),
        (lambda: WarmupPlateau(mode="low"), "mode must be min or max, got 'low'"),
    ],
)
def test_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_what_does_not_fit_into_the_run_is_refused():
    with pytest.raises(ValueError, match="a warm-up of 4000 updates is longer than the run of 200"):
        Noam().multiplier(0, TOTAL)
    with pytest.raises(ValueError, match="a warm-up of 150 updates and a decay of 60 are longer than the run of 200"):
        WarmupStableDecay(warmup=150, decay=60).multiplier(0, TOTAL)


def test_turning_points_are_where_the_curve_turns():
    assert WarmupStableDecay(warmup=20, decay=40).turning_points(TOTAL) == {"end of warm-up": 20, "start of decay": 160}
    points = WarmupCosineRestarts(warmup=20, cycles=3).turning_points(TOTAL)
    assert points == {"end of warm-up": 20, "restart 1": 80, "restart 2": 140}
    made = WarmupCosineRestarts(warmup=20, cycles=3)
    assert all(made.multiplier(step, TOTAL) > made.multiplier(step - 1, TOTAL) for step in (80, 140))


def test_the_plateau_is_torchs():
    values = [3.0, 2.5, 2.4, 2.4, 2.4, 2.4, math.nan, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3] + [2.3] * 60
    schedule = WarmupPlateau(patience=2, factor=0.5, min_lr=1e-3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=1e-3)
    ours = schedule.start(0.1)
    for value in values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.step(value)
        assert 0.1 * ours.observe(value) == pytest.approx(optimizer.param_groups[0]["lr"])
        again = schedule.start(0.1)
        again.load_state_dict(ours.state_dict())
        ours = again
    assert 0.1 * ours.scale == pytest.approx(1e-3)


def test_a_plateau_keeps_its_multiplier_when_the_peak_is_changed():
    schedule = WarmupPlateau(patience=0)
    ours, other = schedule.start(0.1), schedule.start(0.4)
    ours.observe(1.0)
    ours.observe(1.0)
    other.load_state_dict(ours.state_dict())
    assert other.scale == ours.scale == 0.5
