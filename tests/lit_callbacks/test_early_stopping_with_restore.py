"""Stops where it should, ends with the best weights, and goes on as if nothing had been."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from helpers import make_trainer
from lit_callbacks import EarlyStoppingWithRestore, ExactResume, SetupError, VerifiedCheckpoint


class Counts(LightningModule):
    """Its one weight counts the steps; validation losses are given."""

    def __init__(self, losses):
        super().__init__()
        self.w, self.losses = torch.nn.Parameter(torch.zeros(1)), losses

    def training_step(self, batch, batch_idx):
        return -self.w.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses[self.trainer.global_step // 2 - 1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(callback, losses, tmp_path, steps=24, resume=None, extra=()):
    module = Counts(losses)
    settings = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer = make_trainer(
        callbacks=[callback, *extra], default_root_dir=tmp_path, enable_checkpointing=bool(extra), **settings
    )
    trainer.fit(module, DataLoader(torch.zeros(8)), DataLoader(torch.zeros(2)), ckpt_path=resume)
    return module, trainer


LOSSES = [3.0, 2.0, 2.5, math.nan, 2.0, 1.9, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]


def test_it_stops_after_patience_and_has_the_best_weights(tmp_path):
    callback = EarlyStoppingWithRestore(patience=3)
    module, trainer = fit(callback, LOSSES, tmp_path)
    assert trainer.global_step == 10  # better at 4; not at 6, 8 (NaN) and 10
    assert (callback.best_step, callback.best_value) == (4, 2.0)
    assert module.w.item() == 4.0


@pytest.mark.parametrize("patience", [2, 3, 4, 5])
def test_it_stops_where_lightnings_does(tmp_path, patience):
    losses = [3.0, 2.0, 2.5, 2.4, 2.0, 1.9, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    _, ours = fit(EarlyStoppingWithRestore(patience=patience), losses, tmp_path)
    _, theirs = fit(EarlyStopping("val/loss", patience=patience, check_finite=False), losses, tmp_path)
    assert ours.global_step == theirs.global_step


def test_a_run_that_ends_by_itself_has_the_best_weights_too(tmp_path):
    module, trainer = fit(EarlyStoppingWithRestore(), LOSSES, tmp_path, steps=16)
    assert (trainer.global_step, module.w.item()) == (16, 12.0)
    module, _ = fit(EarlyStoppingWithRestore(mode="max", min_delta=1.5), LOSSES, tmp_path, steps=16)
    assert module.w.item() == 14.0


def test_checkpoints_are_the_end_of_training_and_a_resume_decides_as_the_run_that_was_not(tmp_path):
    saver = VerifiedCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    fit(EarlyStoppingWithRestore(patience=3), LOSSES, tmp_path, steps=6, extra=[ExactResume(), saver])
    assert float(torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]["w"]) == 6.0
    callback = EarlyStoppingWithRestore(patience=3)
    again = VerifiedCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    module, trainer = fit(callback, LOSSES, tmp_path, resume="last", extra=[ExactResume(), again])
    assert (trainer.global_step, callback.best_step, module.w.item()) == (10, 4, 4.0)


def test_a_metric_that_nobody_logs_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"monitor='loss'\) found no such metric .*; logged are val/loss"):
        fit(EarlyStoppingWithRestore(monitor="loss"), LOSSES, tmp_path)
