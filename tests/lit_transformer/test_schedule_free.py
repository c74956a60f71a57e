"""Schedule-free optimizers: the average is evaluated and saved, what is trained comes back to the bit."""

from dataclasses import replace
from functools import partial

import pytest
import pytorch_optimizer
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_callbacks import EarlyStoppingWithRestore, ExactResume, LossSpikeRecovery, VerifiedCheckpoint, recommended
from lit_callbacks.testing import Fault, FaultInjector
from lit_transformer import LitCausalLM, WarmupConstant
from lit_transformer.optim.schedule_free import AveragedWeights
from tiny_task import TINY, Blocks, trainer

ADAMW = partial(pytorch_optimizer.ScheduleFreeAdamW, lr=1e-2, weight_decay=0.1)
RADAM = partial(pytorch_optimizer.ScheduleFreeRAdam, lr=1e-2)
SGD = partial(pytorch_optimizer.ScheduleFreeSGD, lr=1e-1)


PLAIN = replace(TINY, attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0)


def task(optimizer=ADAMW, schedule=None, config=PLAIN):
    torch.manual_seed(0)
    return LitCausalLM(config, optimizer, schedule)


class Losses(Callback):
    """What validation found, by step."""

    def __init__(self):
        self.seen = {}

    def on_validation_end(self, trainer, pl_module):
        self.seen[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def fit(tmp_path, module=None, steps=12, resume=None, callbacks=(), **settings):
    module, losses = module or task(), Losses()
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)} | settings
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 2, "num_sanity_val_steps": 1} | settings
    run = trainer(tmp_path, callbacks=[losses, *callbacks], **settings)
    torch.manual_seed(1)
    run.fit(module, Blocks(), ckpt_path=resume, weights_only=False)
    return module, losses.seen, run


def saving(folder, **settings):
    return [ExactResume(), VerifiedCheckpoint(folder, "{step}", save_top_k=-1, **settings)]


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_switching_loses_no_bit():
    parameter = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    optimizer = ADAMW([parameter])
    weights = AveragedWeights(optimizer)
    for i in range(3):
        parameter.grad = torch.full_like(parameter, 0.1 * i)
        optimizer.step()
    before = parameter.detach().clone()
    optimizer.eval()
    average = parameter.detach().clone()
    optimizer.train()
    assert not torch.equal(parameter, before)  # the optimizer's own way back
    with torch.no_grad():
        parameter.copy_(before)
    weights.put_in_place()
    weights.put_in_place()
    assert torch.equal(parameter, average)
    weights.take_out()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("optimizer", [ADAMW, RADAM, SGD])
def test_it_ends_where_a_plain_loop_ends(tmp_path, optimizer):
    ours, seen, _ = fit(tmp_path, task(optimizer))
    theirs = task(optimizer)
    theirs.train()
    plain = optimizer(theirs.param_groups.build(theirs))
    torch.manual_seed(1)
    batches = list(Blocks().train_dataloader())
    for step in range(12):
        plain.zero_grad()
        theirs.training_loss(batches[step % 6]).backward()
        plain.step()
    plain.eval()
    assert same(ours, theirs)
    with torch.no_grad():
        theirs.eval()
        losses = [theirs.training_loss(batch) * batch["targets"].numel() for batch in Blocks().val_dataloader()]
    assert seen[12] == pytest.approx(float(sum(losses)) / (7 * 8), rel=1e-6)


def test_a_checkpoint_holds_the_average(tmp_path):
    _, seen, _ = fit(tmp_path, callbacks=saving(tmp_path / "ck", every_n_train_steps=2))
    for step in (2, 8):
        checkpoint = str(tmp_path / "ck" / f"step={step}.ckpt")
        loaded = LitCausalLM.load_from_checkpoint(checkpoint, weights_only=True)
        run = trainer(tmp_path)
        assert run.validate(loaded, Blocks(), verbose=False)[0]["val/loss"] == pytest.approx(seen[step], rel=1e-6)
        run = trainer(tmp_path, callbacks=saving(tmp_path / "ck", every_n_train_steps=2), enable_checkpointing=True)
        found = run.validate(task(), Blocks(), ckpt_path=checkpoint, verbose=False, weights_only=False)
        assert found[0]["val/loss"] == pytest.approx(seen[step], rel=1e-6)


@pytest.mark.parametrize("how", [{"every_n_train_steps": 3}, {"monitor": "val/loss"}])
@pytest.mark.parametrize("optimizer", [ADAMW, RADAM, SGD, partial(pytorch_optimizer.Prodigy, lr=1.0)])
def test_a_resumed_run_is_the_same(tmp_path, how, optimizer):
    """Saved between validations and within one."""
    whole, losses, run = fit(tmp_path, task(optimizer, config=TINY), callbacks=saving(tmp_path / "ck", **how))
    checkpoint = tmp_path / "ck" / "step=6.ckpt"
    rest, seen, again = fit(
        tmp_path, task(optimizer, config=TINY), resume=checkpoint, callbacks=saving(tmp_path / "ck", **how)
    )
    assert same(whole, rest)
    assert seen.items() <= losses.items()
    assert [*seen][-1] == 12
    keys = ("step", "weight_sum", "lr_max", "d")
    groups = [[{k: g[k] for k in keys if k in g} for g in r.optimizers[0].param_groups] for r in (run, again)]
    assert groups[0] == groups[1]


def test_a_checkpoint_from_after_the_end_goes_on(tmp_path):
    whole, *_ = fit(tmp_path, steps=12, val_check_interval=6)
    _, _, run = fit(tmp_path, steps=6, val_check_interval=6, callbacks=[ExactResume()])
    run.save_checkpoint(tmp_path / "end.ckpt")
    rest, *_ = fit(tmp_path, val_check_interval=6, resume=tmp_path / "end.ckpt", callbacks=[ExactResume()])
    assert same(whole, rest)


def test_beside_recovery_a_poisoned_step_is_left_out(tmp_path):
    def poisoned(**settings):
        faults = FaultInjector([Fault("nan_gradient", step=4)])
        module, _, run = fit(tmp_path, callbacks=[faults, LossSpikeRecovery()], **settings)
        assert run.callback_metrics["loss_spike/skipped_steps"] == 1
        return module

    often, never = poisoned(), poisoned(limit_val_batches=0)
    assert all(p.isfinite().all() for p in often.parameters())
    assert same(often, never)


def test_under_everything_that_is_recommended(tmp_path):
    module = task(schedule=WarmupConstant(warmup=4))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(tmp_path, module, callbacks=recommended())
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_best_weights_that_come_back_are_an_average(tmp_path):
    stopping = EarlyStoppingWithRestore(patience=2)
    module, seen, _ = fit(tmp_path, task(partial(SGD, lr=3.0)), steps=40, callbacks=[stopping])
    assert stopping.best_step < max(seen)
    found = trainer(tmp_path).validate(module, Blocks(), verbose=False)[0]["val/loss"]
    assert found == pytest.approx(seen[stopping.best_step], rel=1e-6)
