"""What is asked of DeepSpeed's engine, tried on stand-ins; the real one is in tests/test_strategies.py."""

import types

import pytest
import torch

from helpers import TinyLM
from lit_callbacks import GradientNormLogger, SetupError
from lit_callbacks._deepspeed import AfterStep, clip_factor, clip_step, missing, pass_over_step, step_follows


class DeepSpeedZeroOptimizer:
    """Of stages 1 and 2: one weight, less one in each step, unless it finds an overflow."""

    loss_scale, _global_grad_norm = 1.0, 0.0

    def __init__(self):
        self.weight, self.overflow, self.check_grad_overflow, self.scaled = 0, False, False, 0
        self.clip_grad = 0.5
        self.clipped = []

    def has_overflow(self, partition_gradients=True):
        return False

    def _update_scale(self, overflow):
        self.scaled += overflow

    def step(self):
        self.overflow = self.check_grad_overflow and self.has_overflow(partition_gradients=True)
        self._update_scale(self.overflow)
        self.weight -= not self.overflow
        self.clipped.append(self.clip_grad)


class DeepSpeedEngine:
    def __init__(self, optimizer):
        self.optimizer, self.module = optimizer, TinyLM()
        self.boundary = False
        for parameter in self.module.parameters():
            parameter._hp_mapping = None

    def is_gradient_accumulation_boundary(self):
        return self.boundary


def trainer_with(engine):
    strategy = type("DeepSpeedStrategy", (), {"model": engine, "config": {}})()
    return types.SimpleNamespace(strategy=strategy, callbacks=[], world_size=2, precision="32-true")


def test_a_step_is_passed_over_once_and_the_next_is_made():
    zero, seen = DeepSpeedZeroOptimizer(), []
    hook = AfterStep(zero, lambda: seen.append(zero.weight))
    pass_over_step(zero)
    zero.step()
    assert (zero.weight, zero.overflow, zero.scaled) == (0, True, 0)
    assert not zero.check_grad_overflow
    zero.step()
    assert (zero.weight, zero.overflow) == (-1, False)
    hook.remove()
    zero.step()
    assert seen == [0, -1]
    assert vars(zero).keys() == vars(DeepSpeedZeroOptimizer()).keys()


def test_one_step_is_clipped_to_what_was_asked_for():
    zero, factors = DeepSpeedZeroOptimizer(), []
    zero._global_grad_norm = 2.0
    hook = AfterStep(zero, lambda: factors.append(clip_factor(DeepSpeedEngine(zero))))
    clip_step(zero, 0.1)
    zero.step()
    zero.step()
    hook.remove()
    assert zero.clipped == [0.1, 0.5]
    assert factors == pytest.approx([0.05, 0.25], rel=1e-6)
    assert zero.clip_grad == 0.5
    clip_step(zero, 0.1)
    pass_over_step(zero)
    zero.step()
    zero.step()
    assert zero.clipped[-1] == zero.clip_grad == 0.5
    assert "step" not in vars(zero)


def test_a_step_follows_at_the_end_of_a_window_only():
    engine = DeepSpeedEngine(DeepSpeedZeroOptimizer())
    assert not step_follows(trainer_with(engine))
    engine.boundary = True
    assert step_follows(trainer_with(engine))
    assert step_follows(trainer_with(torch.nn.Linear(1, 1)))


def test_what_is_missing_is_named():
    zero = DeepSpeedZeroOptimizer()
    engine = DeepSpeedEngine(zero)
    assert missing(engine) == []
    del zero.check_grad_overflow
    assert missing(engine) == ["check_grad_overflow"]
    with pytest.raises(SetupError, match="does not find check_grad_overflow"):
        GradientNormLogger().on_fit_start(trainer_with(engine), engine.module)


def test_an_engine_without_zero_is_refused():
    with pytest.raises(SetupError, match="does not find a ZeRO optimizer"):
        GradientNormLogger().on_fit_start(trainer_with(DeepSpeedEngine(torch.optim.SGD([torch.ones(1)]))), TinyLM())
