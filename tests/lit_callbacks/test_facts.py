import gc
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from helpers import TinyLM, loader
from lit_callbacks import GradientNormLogger, LossCurve, NonFiniteGuard, _facts


class Ask(Callback):
    """Asks for the facts of every step, more than once."""

    def __init__(self):
        self.losses = []
        self.shared = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        facts = _facts.facts_of(trainer)
        self.losses.append(facts.losses(trainer).tolist())
        self.shared.append(facts.grad_norm(trainer, optimizer) is facts.grad_norm(trainer, optimizer))


class Returned(TinyLM):
    """Remembers what training_step returned."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.returned = [*getattr(self, "returned", []), loss.item()]
        return loss


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_losses_are_those_the_module_returned(make_trainer, accumulate, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)] if scaled else []
    ask, module = Ask(), Returned()
    callbacks = [ask, GradientNormLogger(), NonFiniteGuard(), LossCurve()]
    trainer = make_trainer(
        max_epochs=1, callbacks=callbacks, plugins=plugins, accumulate_grad_batches=accumulate, limit_train_batches=14
    )
    trainer.fit(module, loader())
    windows = [module.returned[i : i + accumulate] for i in range(0, 14, accumulate)]
    assert [len(window) for window in windows][-1] == (1 if accumulate == 1 else 2)
    assert ask.losses == [pytest.approx(window, rel=1e-6) for window in windows]
    assert all(ask.shared)


def test_the_gradient_norm_is_computed_once_per_step(make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr(_facts, "share_norms", lambda tensors, of=None: calls.append(1) or torch.ones(len(tensors)))
    callbacks = [GradientNormLogger(every_n_steps=1), NonFiniteGuard(), GradientNormLogger(every_n_steps=2)]
    make_trainer(max_steps=6, callbacks=callbacks).fit(TinyLM(), loader())
    assert len(calls) == 6


def test_nothing_is_kept_after_fit(make_trainer):
    trainer = make_trainer(max_steps=3, callbacks=[GradientNormLogger(every_n_steps=1)])
    trainer.fit(TinyLM(), loader())
    assert trainer not in _facts._FACTS
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None
