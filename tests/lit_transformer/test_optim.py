import math
from functools import partial

import pytest
import torch
from torch import nn

from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import ParamGroups, WarmupCosine
from lit_transformer.optim.spec import factory_spec, instance_spec, load_factory


def test_decay_shrinks_matrices_only():
    model = Transformer(TransformerConfig(d_model=16, n_layers=1, n_heads=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(ParamGroups().build(model), lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {name for name in before if name.startswith("blocks") and name.endswith("weight") and "norm" not in name}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0))


def test_a_model_without_matrices_has_one_group():
    assert [g["name"] for g in ParamGroups().build(nn.LayerNorm(3))] == ["no_decay"]


def test_warmup_cosine_equals_torchs_own_schedulers():
    # Torch's LinearLR starts at start_factor and CosineAnnealingLR is recursive; both end in the same curve as ours.
    total, warmup, floor = 60, 12, 0.1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=2.0 * floor),
        ],
        milestones=[warmup],
    )
    ours = WarmupCosine(warmup=warmup, min_lr_ratio=floor)
    for step in range(total):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * ours.multiplier(step, total), rel=1e-9), step
        optimizer.step()
        reference.step()


def test_warmup_as_a_share_is_rounded_up():
    assert WarmupCosine(warmup=0.05).warmup_steps(1210) == 61
    assert WarmupCosine(warmup=7).warmup_steps(1210) == 7
    assert WarmupCosine(warmup=0).multiplier(0, 10) == 1.0


def test_past_the_end_the_floor_holds():
    assert WarmupCosine(warmup=0, min_lr_ratio=0.2).multiplier(500, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"warmup": 1.5}, "whole number of updates, got 1.5"),
        ({"min_lr_ratio": 1.1}, "between 0 and 1, got 1.1"),
    ],
)
def test_schedules_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(**settings)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 100 updates is longer than the run of 20"):
        WarmupCosine(warmup=100).multiplier(0, 20)


def test_specs_travel_as_plain_data():
    spec = factory_spec(partial(torch.optim.AdamW, lr=3e-4, betas=(0.9, 0.95), eps=1e-8))
    assert spec == {"class_path": "torch.optim.adamw.AdamW", "init_args": {"lr": 3e-4, "betas": (0.9, 0.95)}}
    optimizer = load_factory(spec)([nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == 3e-4
    assert factory_spec(load_factory(spec)) == spec
    assert factory_spec(torch.optim.SGD) == {"class_path": "torch.optim.sgd.SGD", "init_args": {}}

    schedule = WarmupCosine(warmup=5)
    assert load_factory(instance_spec(schedule))() == schedule


def test_what_no_checkpoint_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"expected a class or functools\.partial"):
        factory_spec(lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="expected an instance of a dataclass"):
        instance_spec(math.pi)
