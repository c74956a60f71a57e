"""The range test: the rates it sets, what it measures, where it stops."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from helpers import make_trainer
from lit_transformer import LitCausalLM, ParamGroups
from lit_transformer.optim.lr_range_test import RangeCurve, RangeTest, suggest
from tiny_task import TINY, Blocks, trainer


class Quadratic(LightningModule):
    """Loss w^2 / 2, gradient w: a step of rate r multiplies w by 1 - r."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0]))

    def training_step(self, batch, batch_idx):
        return 0.5 * self.w.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=123.0)


def run(test, accumulate=1):
    module = Quadratic()
    settings = {"max_epochs": -1, "max_steps": 10**6, "accumulate_grad_batches": accumulate}
    make_trainer(callbacks=[test], **settings).fit(module, DataLoader(torch.zeros(8)))
    return test.curve


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_loss_is_that_after_a_step_of_the_rate_beside_it(accumulate):
    curve = run(RangeTest(min_lr=0.01, max_lr=0.2, factor=2.0), accumulate)
    assert curve.rates == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    w, expected = 1.0, []
    for rate in curve.rates:
        w *= 1 - rate
        expected.append(0.5 * w * w)
    assert curve.losses == pytest.approx(expected)


def test_it_stops_when_the_loss_has_grown_fourfold():
    curve = run(RangeTest(min_lr=0.1, max_lr=1e6, factor=2.0))
    assert 2 < curve.rates[len(curve.losses) - 1] < 200
    assert curve.smoothed()[-1] > 4 * min(curve.smoothed())


def test_its_steps_are_those_between_its_ends():
    test = RangeTest()
    assert test.steps == 195
    assert test.min_lr * test.factor ** (test.steps - 1) >= test.max_lr


def test_groups_keep_their_ratios_and_the_schedule_does_not_count(tmp_path):
    states = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            result = super().step(closure)
            states.append([group["lr"] for group in self.param_groups])
            return result

    torch.manual_seed(0)
    module = LitCausalLM(TINY, partial(Recorded, lr=1e-2), param_groups=ParamGroups(layer_decay=0.5))
    test = RangeTest(min_lr=1e-4, max_lr=1e-3, factor=2.0)
    trainer(tmp_path, max_epochs=-1, max_steps=100, limit_val_batches=0, callbacks=[test]).fit(module, Blocks())
    assert [max(rates) for rates in states[:4]] == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4])
    assert all(max(rates) / min(rates) == pytest.approx(8) for rates in states[:4])


def test_the_suggestion():
    assert suggest([1e-3, 1e-2, 1e-1], [2.0, 2.0, 2.0]) is None
    assert RangeCurve().suggestion() is None
    falls_at_the_second = [5.0, 4.0, 1.0, 0.9, 9.0]
    assert suggest([1e-3, 1e-2, 1e-1, 1.0, 10.0], falls_at_the_second) == pytest.approx(math.sqrt(1e-2 * 1e-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_lr": 0.0}, "min_lr must be above 0 and below max_lr, got 0.0 and 1.0"),
        ({"min_lr": 2.0}, "min_lr must be above 0 and below max_lr, got 2.0 and 1.0"),
        ({"factor": 1.0}, "factor must be above 1, got 1.0"),
    ],
)
def test_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RangeTest(**settings)
