"""The terminal and the report say the same of a run."""

import math
import random
import re

import lightning.pytorch
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from helpers import TinyLM, loader
from lit_callbacks import Dashboard, LossSpikeRecovery
from lit_callbacks._heard import Heard
from lit_callbacks._step_losses import Means
from lit_callbacks._trace import Trace
from lit_callbacks.health import diagnose
from lit_callbacks.report import read_run

STEPS = 200
NOISE = [random.Random(0).gauss(0, 0.02) for _ in range(7)]
COURSES = {
    "healthy": [2 + 2 * math.exp(-i / 30) + NOISE[i % 7] for i in range(STEPS)],
    "not learning": [4.3 + NOISE[i % 7] for i in range(STEPS)],
    "diverging": [2 + 2 * math.exp(-i / 30) + NOISE[i % 7] + (5 if i >= 183 else 0) for i in range(STEPS)],
}


class Follows(lightning.pytorch.LightningModule):
    """Has the losses that it is given, and logs them under a name."""

    def __init__(self, key, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.key, self.options = key, options

    def training_step(self, batch, batch_idx):
        loss = batch.mean() + 0.01 * (self.weight - self.weight.detach())
        if self.key:
            self.log(self.key, loss, **self.options)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(make_trainer, folder, losses, key, callbacks=(), module=None, **options):
    dashboard = Dashboard()
    logger = CSVLogger(folder, name="", version="")
    trainer = make_trainer(max_steps=STEPS, logger=logger, callbacks=[*callbacks, dashboard], **options)
    trainer.fit(module or Follows(key), DataLoader(torch.tensor(losses), batch_size=1))
    return dashboard, read_run(folder)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+", text)]


def losses_of(dashboard):
    return Trace(**dashboard.state_dict()["curves"]["train/loss"]).points


@pytest.mark.parametrize("key", ["train/loss", "train_loss", "loss"])
@pytest.mark.parametrize("verdict", COURSES)
def test_terminal_and_report_have_the_same_verdict_key_and_numbers(make_trainer, tmp_path, verdict, key):
    dashboard, run = fit(make_trainer, tmp_path / "run", COURSES[verdict], key)
    there, here = run.diagnosis(), dashboard.diagnosis
    assert (here.verdict, there.verdict) == (verdict, verdict)
    assert here.first_warning_step == there.first_warning_step
    assert re.sub(r"[\d.]+", "", here.sentences[0]) == re.sub(r"[\d.]+", "", there.sentences[0])
    assert numbers(here.sentences[0]) == pytest.approx(numbers(there.sentences[0]), rel=0.02)
    if verdict == "healthy":
        assert f"{key} went from" in here.sentences[0]


def test_a_loss_is_called_as_the_loggers_get_it_and_by_our_name_where_nobody_logs_it(make_trainer, tmp_path):
    module = Follows("train_loss", on_step=True, on_epoch=True)
    dashboard, run = fit(make_trainer, tmp_path / "both", COURSES["healthy"], None, module=module)
    assert "train_loss_step went from" in dashboard.diagnosis.sentences[0]
    assert dashboard.diagnosis.sentences[0] == run.diagnosis().sentences[0]
    dashboard = Dashboard()
    trainer = make_trainer(max_steps=STEPS, callbacks=[dashboard])
    trainer.fit(Follows(None), DataLoader(torch.tensor(COURSES["healthy"]), batch_size=1))
    assert "train/loss went from" in dashboard.diagnosis.sentences[0]


def test_a_skipped_step_is_told_with_the_same_number(make_trainer, tmp_path):
    spiked = [9.0 if i == 60 else loss for i, loss in enumerate(COURSES["healthy"])]
    dashboard, run = fit(make_trainer, tmp_path / "run", spiked, "train_loss", [LossSpikeRecovery()])
    seen = dashboard.diagnosis.sentences[1]
    assert "at step 60, the loss was" in seen
    usual = np.median(spiked[20:60])
    assert f"{9 / usual:.3g} times its usual value" in seen
    assert numbers(seen) == pytest.approx(numbers(run.diagnosis().sentences[1]), rel=0.02)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_of_every_step_the_mean_over_micro_batches_is_judged(make_trainer, accumulate):
    losses = [float(i) for i in range(46)]  # in threes the last step has one micro-batch
    dashboard = Dashboard()
    make_trainer(max_epochs=1, callbacks=[dashboard], accumulate_grad_batches=accumulate).fit(
        Follows(None), DataLoader(torch.tensor(losses), batch_size=1)
    )
    parts = [losses[i : i + accumulate] for i in range(0, len(losses), accumulate)]
    assert dict(losses_of(dashboard)) == pytest.approx({i: float(np.mean(part)) for i, part in enumerate(parts)})


def test_a_scale_that_changes_from_step_to_step_is_taken_out(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    losses, dashboard = [float(i) for i in range(25)], Dashboard()
    plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    trainer = make_trainer(max_steps=25, callbacks=[dashboard], plugins=plugins)
    trainer.fit(Follows(None), DataLoader(torch.tensor(losses), batch_size=1))
    assert scaler.get_scale() > 1024
    assert dict(losses_of(dashboard)) == pytest.approx(dict(enumerate(losses)))


def test_lbfgs_which_asks_often_has_one_loss_a_step(make_trainer):
    dashboard = Dashboard()
    module = TinyLM(optimizer=torch.optim.LBFGS, max_iter=3)
    make_trainer(max_steps=12, callbacks=[dashboard]).fit(module, loader())
    assert [step for step, _ in losses_of(dashboard)] == list(range(12))


def test_a_long_run_keeps_2000_losses_and_a_late_rise_is_seen_where_it_is():
    heard, generator = Heard(), random.Random(0)
    for begin in range(0, 50_000, 10):
        steps = range(begin, begin + 10)
        values = [(7.0 if step >= 49_321 else 2.0) + generator.gauss(0, 0.05) for step in steps]
        heard.keep_losses(Means([*steps], [1] * 10, torch.tensor(values)))
    points = heard.series()["train/loss"]
    assert len(points) <= 2000
    assert [step for step, _ in points[-1000:]] == list(range(49_000, 50_000))
    found = diagnose(heard.series(), [])
    assert (found.verdict, found.first_warning_step) == ("diverging", 49_321)


def test_what_an_older_checkpoint_has_heard_is_gone_on_with():
    older = {
        "keep": "first", "most": 2000, "steps": [0, 10], "values": [3.0, 2.9], "stride": 1, "offered": 2,
        "recent": [[20 + 10 * i, 2.5] for i in range(200)],
    }  # fmt: skip
    dashboard = Dashboard()
    dashboard.load_state_dict({"curves": {"train/loss": older}, "last": {}, "events": []})
    assert len(losses_of(dashboard)) == 202
    dashboard._heard.keep_losses(Means([2020, None], [2, 1], torch.tensor([1.2, 9.0])))
    assert losses_of(dashboard)[-1] == (2020, pytest.approx(2.4)), "and one that was not made is left out"


def test_between_reads_nothing_is_asked_of_the_device(make_trainer, monkeypatch):
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real, name=name: (reads.append(name), real(self))[1])

    def count(callbacks):
        reads.clear()
        make_trainer(max_steps=60, callbacks=callbacks).fit(Follows(None), DataLoader(torch.zeros(60), batch_size=1))
        return len(reads)

    without = count([])
    assert count([Dashboard()]) - without <= 2
