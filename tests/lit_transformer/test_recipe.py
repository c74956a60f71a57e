"""What a run does with optimizer, groups and schedule: short fits."""

import math
from functools import partial

import pytest
import pytorch_optimizer
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder

from lit_callbacks import VerifiedCheckpoint, recommended
from lit_transformer import LitCausalLM, MuonAdamW, Override, ParamGroups, WarmupConstant, WarmupPlateau
from lit_transformer.errors import UsageError
from tiny_task import TINY, Blocks, trainer


class Rates(Callback):
    """The learning rate of each group at each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


def task(optimizer=torch.optim.AdamW, lr=1e-2, **settings):
    torch.manual_seed(0)
    return LitCausalLM(TINY, partial(optimizer, lr=lr), **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RAdam,
        torch.optim.NAdam,
        torch.optim.Adafactor,
        MuonAdamW,
        pytorch_optimizer.Lamb,
        pytorch_optimizer.Lion,
        pytorch_optimizer.SOAP,
    ],
)
def test_any_optimizer_trains_under_the_default_callbacks_and_is_resumed(tmp_path, optimizer):
    module = task(optimizer)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, max_steps=4, callbacks=recommended())
    run.fit(module, Blocks())
    run.save_checkpoint(tmp_path / "some.ckpt")
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())

    again = LitCausalLM.load_from_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    assert again.hparams == module.hparams
    trainer(tmp_path, max_steps=6, callbacks=recommended()).fit(again, Blocks(), ckpt_path=tmp_path / "some.ckpt")
    whole = task(optimizer, schedule=None)
    assert all(p.isfinite().all() for p in again.parameters())
    assert whole.learning_rate == 1e-2


def test_layers_learn_at_their_own_rates(tmp_path):
    rates = Rates()
    groups = ParamGroups(layer_decay=0.5, overrides=[Override("*head*", lr_scale=2.0)])
    with pytest.raises(UsageError, match=r"no parameter matches '\*head\*'"):
        trainer(tmp_path, max_steps=2).fit(task(param_groups=groups), Blocks())
    groups = ParamGroups(layer_decay=0.5, overrides=[Override("*final_norm*", lr_scale=2.0)])
    module = task(param_groups=groups, schedule=WarmupConstant(warmup=2))
    run = trainer(tmp_path, max_steps=2, callbacks=[rates])
    run.fit(module, Blocks())
    names = [group["name"] for group in run.optimizers[0].param_groups]
    assert dict(zip(names, rates.seen[1], strict=True)) == pytest.approx(
        {
            "layer_0_no_decay": 0.00125,
            "layer_1_decay": 0.0025,
            "layer_1_no_decay": 0.0025,
            "layer_2_decay": 0.005,
            "layer_2_no_decay": 0.005,
            "final_norm_layer_3_no_decay": 0.02,
        }
    )
    assert rates.seen[0] == pytest.approx([rate / 2 for rate in rates.seen[1]])


def test_frozen_parameters_stay(tmp_path):
    module = task(param_groups=ParamGroups(overrides=[Override("model.blocks.0.*", freeze=True)]))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(tmp_path, max_steps=3).fit(module, Blocks())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("model.blocks.0.")}


# ---- plateau


class Losses(LitCausalLM):
    """Validation losses as given."""

    values: tuple[float, ...] = ()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.values[self.trainer.global_step // 2 - 1])


def plateau(tmp_path, steps, resume=None, values=(3.0, 2.0, 2.0, 2.0, 2.0, 1.0), callbacks=()):
    torch.manual_seed(0)
    schedule = WarmupPlateau(warmup=3, patience=1, factor=0.5)
    module, rates = Losses(TINY, partial(torch.optim.AdamW, lr=1e-2), schedule), Rates()
    module.values = values
    saver = VerifiedCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 2, "enable_checkpointing": True}
    run = trainer(tmp_path, callbacks=[rates, *callbacks, saver], num_sanity_val_steps=0, **settings)
    run.fit(module, Blocks(), ckpt_path=resume)
    return [rate for rate, *_ in rates.seen]


def test_the_plateau_lowers_the_rate_after_the_warm_up(tmp_path):
    # Validations after steps 2 (in the warm-up, not seen), 4: 2.0, 6: 2.0, 8: 2.0 (lower), 10: 2.0, 12: 1.0.
    warm = [1e-2 / 3, 2e-2 / 3, 1e-2]
    assert plateau(tmp_path, 12) == pytest.approx([*warm, *[1e-2] * 5, *[5e-3] * 4])


@pytest.mark.parametrize("at", [6, 8, 10])
def test_a_resumed_plateau_goes_on(tmp_path, at):
    expected = plateau(tmp_path / "a", 12, callbacks=recommended())
    plateau(tmp_path / "b", 11, callbacks=recommended())
    rest = plateau(tmp_path / "b", 12, tmp_path / "b" / f"step={at}.ckpt", callbacks=recommended())
    assert rest == expected[at:]


def test_a_plateau_of_a_metric_that_nobody_logs_is_refused(tmp_path):
    module = task(schedule=WarmupPlateau(warmup=0, monitor="val/los"))
    with pytest.raises(UsageError, match=r"monitor='val/los'\) found no such metric after a validation: .*val/loss"):
        trainer(tmp_path, max_steps=6, val_check_interval=2).fit(module, Blocks())


# ---- learning_rate


def test_setting_the_learning_rate_scales_all_groups(tmp_path):
    module, rates = task(param_groups=ParamGroups(layer_decay=0.5), schedule=WarmupConstant(warmup=2)), Rates()
    assert module.learning_rate == 1e-2
    module.learning_rate = 3e-2
    assert module.learning_rate == pytest.approx(3e-2)
    trainer(tmp_path, max_steps=2, callbacks=[rates]).fit(module, Blocks())
    assert max(rates.seen[1]) == pytest.approx(3e-2)
    assert min(rates.seen[1]) == pytest.approx(3e-2 / 8)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightnings_finder_leaves_groups_and_schedule_as_they_are(tmp_path):
    rates = Rates()
    module = task(param_groups=ParamGroups(layer_decay=0.5), schedule=WarmupConstant(warmup=2))
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    run = trainer(tmp_path, max_steps=4, max_epochs=-1, callbacks=[finder, rates], enable_checkpointing=True)
    run.fit(module, Blocks())
    found = finder.optimal_lr.suggestion()
    assert module.learning_rate == pytest.approx(found)
    assert max(rates.seen[-1]) == pytest.approx(found)
    assert min(rates.seen[-1]) == pytest.approx(found / 8)
    assert max(rates.seen[-4]) == pytest.approx(found / 2)
    assert math.isfinite(found)


class NeedsRoom(LitCausalLM):
    """Has room for five samples."""

    def training_step(self, batch, batch_idx):
        if len(batch["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_lightnings_batch_size_finder_finds_what_fits_and_begins_anew(tmp_path):
    torch.manual_seed(0)
    module, data = (
        NeedsRoom(TINY, partial(torch.optim.AdamW, lr=1e-2), WarmupConstant(2)),
        Blocks(batch_size=1, batches=24),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    first = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            first.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=1)
    run = trainer(tmp_path, max_steps=3, callbacks=[finder, Look()], enable_checkpointing=True, limit_val_batches=0)
    run.fit(module, data)
    assert (data.batch_size, run.global_step) == (4, 3)
    assert all(torch.equal(first[name], value) for name, value in before.items())
