"""Exactly the parameters of a stage move, at its rate, in the right mode, also when resumed in any stage."""

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from helpers import make_trainer
from lit_callbacks import ExactResume, GradualUnfreezing, LossSpikeRecovery, SetupError, VerifiedCheckpoint
from lit_callbacks._learning_rate import lower_learning_rate

STAGES = ["*classifier*|*pooler*", "*layer.1.*"]


class FineTune(LightningModule):
    """A tiny BERT that tells sequences with many large tokens from others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=20, max_position_embeddings=16, **small))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def data():
    x = torch.randint(1, 20, (32, 8), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.float().mean(1) > 10).long()), 8, shuffle=True)  # four batches


class Watch(Callback):
    """What has moved in each epoch, and which modules were in eval mode."""

    def __init__(self):
        self.moved, self.evaluated, self.before = {}, {}, {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.evaluated[trainer.current_epoch] = {name for name, m in pl_module.named_modules() if not m.training}

    def on_train_epoch_end(self, trainer, pl_module):
        now = dict(pl_module.named_parameters())
        self.moved[trainer.current_epoch] = {n for n, p in self.before.items() if not torch.equal(now[n], p)}


def fit(tmp_path, resume=None, extra=(), module=None, **options):
    watch, module = Watch(), module or FineTune()
    torch.manual_seed(1)
    unfreezing = GradualUnfreezing(**{"stages": STAGES, "epochs": [1, 2], **options})
    settings = {"max_epochs": 4, "default_root_dir": tmp_path, "enable_checkpointing": bool(extra)}
    trainer = make_trainer(callbacks=[unfreezing, watch, *extra], **settings)
    trainer.fit(module, data(), ckpt_path=resume)
    return module, watch, trainer


def test_exactly_the_parameters_of_a_stage_move(tmp_path):
    module, watch, _ = fit(tmp_path)
    everything = {name for name, _ in module.named_parameters()}
    head = {name for name in everything if "classifier" in name or "pooler" in name}
    top = head | {name for name in everything if ".layer.1." in name}
    keys = {name for name in everything if name.endswith("key.bias")}  # adds the same to all logits: no gradient
    assert watch.moved[0] == head
    assert watch.moved[1] - keys == watch.moved[2] - keys == top - keys
    assert watch.moved[3] | keys == everything
    assert all(p.requires_grad for p in module.parameters())


def test_frozen_modules_are_in_eval_mode(tmp_path):
    module, watch, _ = fit(tmp_path)
    bert = "model.bert"
    assert {f"{bert}.embeddings", f"{bert}.embeddings.dropout", f"{bert}.encoder.layer.1"} <= watch.evaluated[0]
    assert not {"model.dropout", "model.classifier", f"{bert}.pooler"} & watch.evaluated[0]
    assert f"{bert}.encoder.layer.0" in watch.evaluated[1]
    assert not any(name.startswith(f"{bert}.encoder.layer.1") for name in watch.evaluated[1])
    assert watch.evaluated[3] == set()
    assert all(m.training for m in module.modules())


def test_rates_are_the_optimizers_times_those_of_the_stage(tmp_path):
    seen = []

    class Sees(torch.optim.AdamW):
        def step(self, closure=None):
            loss = closure()
            seen.append(self.param_groups[0]["lr"])
            return super().step(lambda: loss)

    class Module(FineTune):
        def configure_optimizers(self):
            optimizer = Sees(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]  # multiplies what it finds

    _, _, trainer = fit(tmp_path, lr_scales=[1.0, 0.5, 0.1], module=Module())
    assert seen == pytest.approx([1e-2] * 4 + [5e-3] * 4 + [2.5e-3] * 4 + [5e-4] * 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2.5e-3)


@pytest.mark.parametrize("at", [2, 4, 6, 12, 14])
def test_a_resume_in_any_stage_is_the_same_run(tmp_path, at):
    def savers():
        return [ExactResume(), VerifiedCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=2, save_top_k=-1)]

    expected, *_ = fit(tmp_path, extra=savers())
    actual, *_ = fit(tmp_path, resume=str(tmp_path / "ck" / f"step={at}.ckpt"), extra=savers())
    assert all(torch.equal(v, actual.state_dict()[k]) for k, v in expected.state_dict().items())


def test_beside_recovery(tmp_path):
    _, watch, trainer = fit(tmp_path, extra=[LossSpikeRecovery(), VerifiedCheckpoint(tmp_path / "ck")])
    assert trainer.global_step == 16
    assert len(watch.moved[3]) > len(watch.moved[0])


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_recovery_skips_leaves_the_rate_as_it_is(tmp_path, first):
    class Bad(FineTune):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 5 else loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 100), "interval": "step"}]

    unfreezing = GradualUnfreezing(stages=STAGES, epochs=[1, 2], lr_scales=[1.0, 0.5, 0.1])
    callbacks = [unfreezing, LossSpikeRecovery()] if first else [LossSpikeRecovery(), unfreezing]
    trainer = make_trainer(max_epochs=4, default_root_dir=tmp_path, callbacks=callbacks)
    trainer.fit(Bad(), data())
    assert trainer.global_step == 16
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2)


def test_several_callbacks_may_lower_the_rate_of_a_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    hooks = lower_learning_rate(optimizer, 0.5, False) + lower_learning_rate(optimizer, 0.1, False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    for hook in hooks:
        hook.remove()
    hooks = lower_learning_rate(optimizer, 0.5, True)  # a step that a scaler leaves out
    for hook in hooks:
        hook.remove()
    optimizer.param_groups[0]["lr"] = 2.0
    lower_learning_rate(optimizer, 0.5, False)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_the_defaults_are_five_epochs_of_the_head_and_then_a_tenth_for_all():
    callback = GradualUnfreezing()
    assert [callback.stage_of(epoch) for epoch in (0, 4, 5, 100)] == [0, 0, 1, 1]


@pytest.mark.parametrize("stages", [["*nowhere*"], ["*classifier*", "*layer.7.*"]])
def test_a_glob_that_matches_nothing_is_refused(tmp_path, stages):
    with pytest.raises(SetupError, match=r"stages\[\d\] = '.*' matches no parameter; names are such as model"):
        fit(tmp_path, stages=stages, epochs=[1] * len(stages))


def test_parameters_outside_of_the_optimizer_are_refused(tmp_path):
    class HeadOnly(FineTune):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.classifier.parameters())

    with pytest.raises(SetupError, match="other parameters are in no optimizer"):
        fit(tmp_path, module=HeadOnly())
