import json
import math
import sys

import pytest
import torch

from helpers import TinyLM, TwoOptimizers, loader
from lit_callbacks import LossCurve
from lit_callbacks._curve import Curve


class KeepsLosses(TinyLM):
    """Remembers the losses it returned; logs its validation loss under another name if told to."""

    val_name = "val/loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(self.val_name, self.loss(batch))


@pytest.mark.parametrize("val_name", ["val/loss", "val_loss"])
def test_records_both_losses_at_their_steps_and_draws(make_trainer, tmp_path, val_name):
    curve, module = LossCurve(every_n_steps=3), KeepsLosses()
    module.val_name = val_name
    trainer = make_trainer(max_epochs=2, callbacks=[curve])
    trainer.fit(module, loader(n_samples=32), loader(n_samples=8))
    assert curve.train.steps == [0, 3, 6, 9, 12, 15]
    assert curve.train.values == pytest.approx(module.losses[::3], rel=1e-6)
    assert curve.val.steps == [8, 16], "the sanity check is not a validation"
    assert curve.val.values[-1] == pytest.approx(trainer.callback_metrics[val_name].item())
    assert (tmp_path / "figures/loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_accumulation_averages_over_the_window_undivided(make_trainer):
    curve, module = LossCurve(every_n_steps=1), KeepsLosses()
    make_trainer(max_epochs=1, callbacks=[curve], accumulate_grad_batches=4).fit(module, loader())
    windows = torch.tensor(module.losses).view(4, 4).mean(1).tolist()
    assert curve.train.values == pytest.approx(windows, rel=1e-6)


def test_with_two_optimizers_it_is_the_loss_behind_the_first(make_trainer):
    curve = LossCurve(every_n_steps=1)
    make_trainer(max_steps=6, callbacks=[curve]).fit(TwoOptimizers(), loader())
    assert curve.train.steps == [0, 2, 4]


def test_a_run_that_failed_is_drawn_too(make_trainer, tmp_path):
    class Breaks(TinyLM):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                raise RuntimeError("broken")
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(max_steps=9, callbacks=[LossCurve(every_n_steps=1)]).fit(Breaks(), loader(faults={9: "nan"}))
    assert (tmp_path / "figures/loss_curve.png").exists()


def test_without_matplotlib_it_warns_once(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="LossCurve could not draw") as warned:
        make_trainer(max_steps=2, callbacks=[LossCurve(every_n_steps=1)]).fit(TinyLM(), loader())
    assert sum("could not draw" in str(warning.message) for warning in warned) == 1
    assert not (tmp_path / "figures").exists()


def test_a_curve_stays_bounded_and_evenly_spaced():
    curve = Curve()
    for step in range(10 * curve.most):
        curve.add(step, float(step))
    assert curve.most / 2 <= len(curve.steps) <= curve.most == 2000
    assert {b - a for a, b in zip(curve.steps, curve.steps[1:], strict=False)} == {curve.stride}
    assert curve.values == [float(step) for step in curve.steps]
    json.dumps(curve.state_dict())


def test_a_saved_curve_continues_as_if_never_interrupted():
    whole, half = Curve(), Curve()
    for step in range(3 * whole.most):
        whole.add(step, math.sqrt(step))
        half.add(step, math.sqrt(step))
        if step == whole.most + 7:
            half = Curve(**half.state_dict())
    assert vars(half) == vars(whole)


def test_a_resumed_run_forgets_what_it_repeats(make_trainer, tmp_path):
    curve = LossCurve(every_n_steps=1)
    trainer = make_trainer(max_epochs=1, callbacks=[curve])
    trainer.fit(TinyLM(), loader(n_samples=16), loader(n_samples=8))
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    assert (curve.train.steps, curve.val.steps) == ([0, 1, 2, 3], [4])

    make_trainer(max_epochs=1, callbacks=[curve]).fit(TinyLM(), loader(n_samples=8), loader(n_samples=8))
    assert (curve.train.steps, curve.val.steps) == ([0, 1], [2]), "a new run with the same callback starts over"

    resumed = LossCurve(every_n_steps=1)
    make_trainer(max_epochs=2, callbacks=[resumed]).fit(
        TinyLM(), loader(n_samples=16), loader(n_samples=8), ckpt_path=tmp_path / "epoch.ckpt", weights_only=True
    )
    assert (resumed.train.steps, resumed.val.steps) == ([0, 1, 2, 3, 4, 5, 6, 7], [4, 8])
