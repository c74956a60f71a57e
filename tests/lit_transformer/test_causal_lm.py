import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torchmetrics.text import Perplexity as ReferencePerplexity

from lit_transformer import LitCausalLM, TransformerConfig, WarmupCosine
from lit_transformer.errors import UsageError
from lit_transformer.metrics import BitsPerByte
from tiny_task import TINY, Blocks, trainer


def task(**settings):
    torch.manual_seed(0)
    return LitCausalLM(TINY, partial(torch.optim.AdamW, lr=1e-2), **settings)


def test_label_smoothing_is_torchs_and_leaves_0_91_to_the_target_of_ten_classes():
    # With all of the probability mass on the smoothed target distribution q, the loss is the entropy of q; the loss of
    # logits z is -sum_k q_k log p_k, so its gradient in z is p - q: q can be read off.
    module = LitCausalLM(
        TransformerConfig(vocab_size=10, max_length=4, d_model=8, n_layers=1, n_heads=1), label_smoothing=0.1
    )
    logits = torch.randn(1, 1, 10, requires_grad=True)
    module.forward = lambda ids, documents: logits
    module.training_loss({"input_ids": torch.zeros(1, 1).long(), "targets": torch.tensor([[3]])}).backward()
    q = logits.softmax(-1) - logits.grad
    assert q[0, 0, 3].item() == pytest.approx(0.91, abs=1e-6)
    others = torch.cat((q[0, 0, :3], q[0, 0, 4:]))
    torch.testing.assert_close(others, torch.full((9,), 0.01), atol=1e-6, rtol=0)


def test_validation_metrics_equal_those_of_all_tokens_at_once(tmp_path):
    module, data = task(label_smoothing=0.3), Blocks()
    (metrics,) = trainer(tmp_path).validate(module, data, verbose=False)

    module.eval()
    ids = torch.stack([s["input_ids"] for s in data.samples[:7]])
    targets = torch.stack([s["targets"] for s in data.samples[:7]])
    logits = module(ids)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    perplexity = ReferencePerplexity()
    assert metrics["val/loss"] == pytest.approx(nats / 56, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(perplexity(logits, targets).item(), rel=1e-4)
    assert metrics["val/accuracy"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / targets.sum().item(), rel=1e-5)


def test_bits_per_byte_is_absent_when_the_data_does_not_know_its_bytes(tmp_path):
    data = Blocks()
    del data.token_bytes
    (metrics,) = trainer(tmp_path).test(task(), data, verbose=False)
    assert set(metrics) == {"test/loss", "test/perplexity", "test/accuracy"}


def test_bits_per_byte_of_uniform_bytes_is_eight():
    metric = BitsPerByte()
    metric.update(torch.full((3, 5), math.log(256)), torch.ones(3, 5, dtype=torch.int64))
    assert metric.compute().item() == pytest.approx(8)


def test_predict_scores_each_sequence(tmp_path):
    module, data = task(), Blocks()
    predictions = trainer(tmp_path).predict(module, data)
    losses = torch.cat([p["loss"] for p in predictions])
    module.eval()
    sample = data.samples[4]
    expected = torch.nn.functional.cross_entropy(module(sample["input_ids"][None])[0], sample["targets"])
    assert losses.shape == (7,)
    torch.testing.assert_close(losses[4], expected)


class Recorder(Callback):
    def __init__(self):
        self.lr, self.groups, self.norms = [], None, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lr.append([group["lr"] for group in optimizer.param_groups])
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def test_the_learning_rate_is_the_schedule_times_lr_at_every_step(tmp_path):
    recorder = Recorder()
    schedule = WarmupCosine(warmup=3, min_lr_ratio=0.2)
    module = task(schedule=schedule)
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4, callbacks=[recorder]).fit(module, Blocks())
    # Six batches in windows of four are two steps an epoch.
    assert recorder.lr == [[pytest.approx(1e-2 * schedule.multiplier(step, 4))] * 2 for step in range(4)]
    decay, no_decay = recorder.groups
    assert (decay["name"], decay["weight_decay"], decay["fused"]) == ("decay", 0.01, True)
    assert (no_decay["name"], no_decay["weight_decay"], no_decay["fused"]) == ("no_decay", 0.0, True)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
        ({"fast_dev_run": 2}, 2),
    ],
)
def test_total_steps_are_those_that_are_made(tmp_path, settings, steps):
    seen = []

    class Schedule(WarmupCosine):
        def multiplier(self, step, total_steps):
            seen.append(total_steps)
            return 1.0

    run = trainer(tmp_path, limit_val_batches=0, **settings)
    run.fit(task(schedule=Schedule()), Blocks())
    assert set(seen) == {steps}
    assert run.global_step == steps


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"set trainer\.max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(task(), Blocks())


def test_a_warmup_that_does_not_fit_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UsageError, match="warm-up of 50 updates is longer than the run of 6"):
        trainer(tmp_path).fit(task(schedule=WarmupCosine(warmup=50)), Blocks())


def test_blocks_longer_than_the_model_takes_are_refused(tmp_path):
    data = Blocks()
    data.block_size = 9
    with pytest.raises(UsageError, match=r"blocks of 9 tokens, but the model takes 8 at most"):
        trainer(tmp_path).fit(task(), data)


def test_target_batch_tokens_derives_accumulation_and_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_transformer.recipe.rank_zero_info", said.append)
    module = task(target_batch_tokens=100)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(module, Blocks())
    assert run.accumulate_grad_batches == 4  # batches of 32 tokens
    assert run.global_step == 2
    assert "Effective batch: 128 tokens = 1 device x 32 tokens x 4 accumulated batches (target 100)." in said

    run.save_checkpoint(tmp_path / "a.ckpt")
    data = Blocks(batch_size=2)  # as on half the devices
    longer = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    longer.fit(task(target_batch_tokens=100), data, ckpt_path=tmp_path / "a.ckpt")
    assert longer.accumulate_grad_batches == 7
    assert said[-2].startswith("Before this resume: Effective batch: 128 tokens")
    assert said[-1].startswith("Effective batch: 112 tokens = 1 device x 16 tokens x 7")


def test_accumulation_from_two_sides_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"derives an accumulation of 4, but .*=2 is set as well"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(task(target_batch_tokens=100), Blocks())


def test_target_batch_tokens_needs_to_know_a_batch(tmp_path):
    data = Blocks()
    del data.tokens_per_batch
    with pytest.raises(UsageError, match="needs a data module with tokens_per_batch"):
        trainer(tmp_path).fit(task(target_batch_tokens=100), data)


def test_a_checkpoint_is_loaded_back_without_pickle_and_equals_the_original(tmp_path):
    module = task(label_smoothing=0.05, schedule=WarmupCosine(warmup=2), target_batch_tokens=64)
    run = trainer(tmp_path)
    run.fit(module, Blocks())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitCausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.config == module.config
    assert loaded.schedule == module.schedule
    assert dict(loaded.hparams) == dict(module.hparams)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_resumed_run_follows_its_own_settings_and_an_extended_one_continues_the_curve(tmp_path):
    schedule = WarmupCosine(warmup=2)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(task(schedule=schedule), Blocks())
    first.save_checkpoint(tmp_path / "a.ckpt")

    recorder = Recorder()
    torch.manual_seed(0)
    longer = LitCausalLM(TINY, partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.2), schedule=schedule)
    trainer(tmp_path, max_epochs=3, callbacks=[recorder]).fit(longer, Blocks(), ckpt_path=tmp_path / "a.ckpt")
    assert recorder.lr == [[pytest.approx(5e-3 * schedule.multiplier(step, 18))] * 2 for step in range(6, 18)]
    assert recorder.groups[0]["weight_decay"] == 0.2
    assert recorder.groups[1]["weight_decay"] == 0.0


def test_gradient_scaler_clipping_and_accumulation_work_with_the_fused_optimizer(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024))
    module = task()
    before = module.model.head.weight.detach().clone()
    run = trainer(tmp_path, plugins=[plugin], gradient_clip_val=1.0, accumulate_grad_batches=2, limit_val_batches=0)
    run.fit(module, Blocks())
    assert not torch.equal(before, module.model.head.weight)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_it_learns_what_can_be_learnt(tmp_path):
    data = Blocks()
    counting = (torch.arange(9) + torch.arange(24)[:, None]) % 11
    data.samples = [{"input_ids": row[:-1], "targets": row[1:]} for row in counting]
    module = task()
    trainer(tmp_path, max_epochs=30, limit_val_batches=0).fit(module, data)
    (metrics,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert metrics["val/accuracy"] > 0.95
    assert metrics["val/loss"] < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"target_batch_tokens": 0}, "target_batch_tokens must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)


def test_same_seed_same_weights(tmp_path):
    def weights():
        module = task()
        torch.manual_seed(7)
        trainer(tmp_path, limit_val_batches=0).fit(module, Blocks())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(), weights())
