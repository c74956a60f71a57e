import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from helpers import MemoryLogger, TinyLM, TokensWithIds, TwoOptimizers, assert_identical, loader, snapshot
from lit_callbacks import NonFiniteError, NonFiniteGuard
from lit_callbacks.health import diagnose


def fit(make_trainer, data, options=None, **trainer_options):
    torch.manual_seed(0)
    module = TinyLM(**options or {})
    guard, logger = NonFiniteGuard(), MemoryLogger()
    trainer = make_trainer(max_epochs=1, callbacks=[guard], logger=logger, **trainer_options)
    trainer.fit(module, data)
    return snapshot(module, trainer), guard, logger, trainer


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_norm": True}, {"optimizer": torch.optim.SGD, "momentum": 0.9}], ids=str
)
def test_a_skipped_batch_leaves_no_trace(make_trainer, fault, options):
    poisoned, guard, logger, trainer = fit(make_trainer, loader(faults={21: fault}), options)
    clean, *_ = fit(make_trainer, loader(without=[5]), options)
    assert_identical(poisoned, clean)
    assert guard.state_dict() == {"nonfinite": 1, "skipped_steps": 1, "in_a_row": 0}
    counters = {"loss_spike/nonfinite": 1.0, "loss_spike/skipped_steps": 1.0}
    assert logger.calls == [(5, counters)]
    assert {key: trainer.callback_metrics[key].item() for key in counters} == counters


def test_without_the_guard_the_same_batch_ruins_the_weights(make_trainer):
    module = TinyLM()
    make_trainer(max_epochs=1).fit(module, loader(faults={21: "nan"}))
    assert module.head.weight.isnan().all()


@pytest.mark.parametrize("fault", ["nan", "gradient"])
def test_one_bad_micro_batch_drops_its_whole_window(make_trainer, fault):
    options = {"batch_norm": True}
    poisoned, guard, *_ = fit(make_trainer, loader(faults={21: fault}), options, accumulate_grad_batches=4)
    clean, *_ = fit(make_trainer, loader(without=[4, 5, 6, 7]), options, accumulate_grad_batches=4)
    assert_identical(poisoned, clean)
    assert guard.state_dict()["skipped_steps"] == 1


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str)
def test_clipping_and_bf16_change_nothing_about_it(make_trainer, options):
    poisoned, guard, *_ = fit(make_trainer, loader(faults={21: "nan"}), **options)
    clean, *_ = fit(make_trainer, loader(without=[5]), **options)
    assert_identical(poisoned, clean)
    assert guard.state_dict()["skipped_steps"] == 1


def test_patience_ends_the_run_with_the_last_good_weights(make_trainer, tmp_path):
    good, *_ = fit(make_trainer, loader(n_samples=16))
    torch.manual_seed(0)
    module = TinyLM()
    trainer = make_trainer(max_epochs=1, callbacks=[NonFiniteGuard(patience=3)])
    data = TokensWithIds(faults=dict.fromkeys(range(16, 64), "nan"))
    with pytest.raises(NonFiniteError, match=r"step 6 after 3 skipped.*'?embedding\.weight.*\[24, 25, 26, 27\]"):
        trainer.fit(module, data)
    assert_identical([module.state_dict(), []], [good[0], []])
    told = [(event["step"], event["event"]) for event in events(tmp_path)]
    assert told == [(4, "skip"), (5, "skip"), (6, "skip"), (6, "stop")]
    assert diagnose({"train/loss": [(step, 3.0) for step in range(4)]}, events(tmp_path)).verdict == "stopped"


def test_good_steps_reset_patience(make_trainer):
    faults = {index: "nan" for index in range(64) if index // 4 % 3}
    _, guard, *_ = fit(make_trainer, loader(faults=faults))
    assert guard.state_dict() == {"nonfinite": 10, "skipped_steps": 10, "in_a_row": 0}


def test_events_name_rule_numbers_samples_and_parameter(make_trainer, tmp_path):
    data = TokensWithIds(faults={5: "nan", 20: "gradient"})
    fit(make_trainer, data, accumulate_grad_batches=2)
    loss, gradient = events(tmp_path)
    assert math.isfinite(gradient.pop("loss"))
    assert loss == {
        "step": 0, "event": "skip", "rule": "non_finite_loss", "in_a_row": 1, "loss": "nan", "grad_norm": "nan",
        "parameter": "embedding.weight", "first_bad_rank": 0, "sample_ids": [4, 5, 6, 7],
    }  # fmt: skip
    assert gradient == {
        "step": 2, "event": "skip", "rule": "non_finite_gradient", "in_a_row": 1, "grad_norm": "nan",
        "parameter": "hidden.weight", "sample_ids": [16, 17, 18, 19, 20, 21, 22, 23],
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_costs_one_warning(make_trainer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Events of this run are not being written down") as warned:
        _, guard, *_ = fit(make_trainer, loader(faults={1: "nan", 9: "nan"}), default_root_dir=tmp_path / "file")
    assert guard.state_dict()["skipped_steps"] == 2
    assert sum("written down" in str(warning.message) for warning in warned) == 1


def scaled(**options):
    scaler = torch.amp.GradScaler("cpu", **options)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


def test_an_overflowing_scaler_is_left_to_its_search(make_trainer):
    precision = scaled(init_scale=2.0**40)
    _, guard, _, _ = fit(make_trainer, loader(), **precision)
    assert precision["plugins"][0].scaler.get_scale() < 2.0**40
    assert guard.state_dict()["nonfinite"] == 0


def test_a_bad_loss_under_a_scaler_is_skipped(make_trainer):
    poisoned, guard, *_ = fit(make_trainer, loader(faults={21: "nan"}), **scaled(init_scale=1024.0))
    clean, *_ = fit(make_trainer, loader(without=[5]), **scaled(init_scale=1024.0))
    assert guard.state_dict()["skipped_steps"] == 1
    torch.testing.assert_close(poisoned[0], clean[0], rtol=1e-3, atol=1e-5)  # the scaler has halved its factor


def test_a_fused_optimizer_under_a_scaler_is_refused(make_trainer):
    with pytest.raises(ValueError, match="Use fused=False"):
        fit(make_trainer, loader(), {"fused": True}, **scaled())


def test_a_fused_optimizer_alone_is_fine(make_trainer):
    poisoned, guard, *_ = fit(make_trainer, loader(faults={21: "nan"}), {"fused": True})
    clean, *_ = fit(make_trainer, loader(without=[5]), {"fused": True})
    assert_identical(poisoned, clean)
    assert guard.state_dict()["skipped_steps"] == 1


class DecaysAnyway(torch.optim.SGD):
    """Applies weight decay to parameters without a gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * 0.1)
        return loss


class Counts(torch.optim.SGD):
    """Counts steps in its state, gradients or not."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
        return super().step(closure)


class Unusual(torch.optim.SGD):
    """Cannot be built from its defaults."""

    def __init__(self, parameters, lr, *, secret):
        super().__init__(parameters, lr)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer": DecaysAnyway}, "DecaysAnyway: it moves parameters or its state"),
        ({"optimizer": Counts}, "Counts: it moves parameters or its state"),
        ({"optimizer": Unusual, "secret": 1}, "Unusual: it could not be tried on a toy parameter"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS: it moves"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_an_optimizer_that_cannot_be_skipped_is_refused(make_trainer, options, reason):
    with pytest.raises(ValueError, match=reason):
        fit(make_trainer, loader(), options)


def test_a_warmup_from_zero_does_not_hide_what_an_optimizer_does(make_trainer):
    with pytest.raises(ValueError, match="DecaysAnyway"):
        fit(make_trainer, loader(), {"optimizer": DecaysAnyway, "lr": 0.0})


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {}), ("Adam", {"amsgrad": True}), ("RMSprop", {}), ("Adagrad", {}), ("NAdam", {}), ("Adafactor", {})],
)
def test_the_optimizers_of_torch_can_be_skipped(make_trainer, name, options):
    _, guard, *_ = fit(make_trainer, loader(faults={1: "nan"}), {"optimizer": getattr(torch.optim, name), **options})
    assert guard.state_dict()["skipped_steps"] == 1


def test_manual_optimization_is_refused(make_trainer):
    with pytest.raises(ValueError, match="needs automatic optimization"):
        make_trainer(max_steps=1, callbacks=[NonFiniteGuard()]).fit(TwoOptimizers(), loader())


def test_a_resumed_guard_goes_on_counting(make_trainer, tmp_path):
    def trainer(epochs):
        return make_trainer(max_epochs=epochs, callbacks=[NonFiniteGuard(patience=6)])

    data = {"faults": dict.fromkeys(range(4, 16), "nan"), "n_samples": 16}
    first = trainer(1)
    first.fit(TinyLM(), loader(**data))
    first.save_checkpoint(tmp_path / "epoch.ckpt")
    data["faults"][0] = "nan"
    with pytest.raises(NonFiniteError, match="step 6 after 6 skipped"):
        trainer(3).fit(TinyLM(), loader(**data), ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning says it once in a process
def test_a_step_without_a_loss_is_not_an_anomaly(make_trainer):
    class Silent(TinyLM):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else self.loss(batch)

    guard = NonFiniteGuard()
    make_trainer(max_steps=5, callbacks=[guard]).fit(Silent(), loader())
    assert guard.state_dict()["nonfinite"] == 0


def test_the_state_right_after_a_bad_step_is_the_one_right_before(make_trainer):
    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                self.before = snapshot(pl_module, trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                assert not outputs["loss"].isfinite()
                assert_identical(snapshot(pl_module, trainer), self.before)

    trainer = make_trainer(max_steps=6, callbacks=[NonFiniteGuard(), Watch()])
    trainer.fit(TinyLM(batch_norm=True), loader(faults={13: "nan"}))
    assert trainer.global_step == 6
