import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import MemoryLogger, TinyLM, loader
from lit_callbacks import AttentionEntropyMonitor


class Sharp(TinyLM):
    """Queries and keys that are multiplied by `sharpness[step]`."""

    def __init__(self, sharpness, **options):
        super().__init__(lr=0.0, weight_decay=0.0, **options)
        self.sharpness = sharpness

    def training_step(self, batch, batch_idx):
        weights = [block.attention.weight for block in self.blocks]
        originals = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight in weights:
                weight[:32] *= self.sharpness[self.global_step]
        loss = super().training_step(batch, batch_idx)
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
        return loss


def fit(make_trainer, module=None, data=None, **options):
    monitor = AttentionEntropyMonitor(**{"every_n_steps": 1, **options.pop("monitor", {})})
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[monitor], logger=logger, **options)
    trainer.fit(module or TinyLM(), data or loader(), ckpt_path=None)
    return monitor, logger, trainer


def events(trainer):
    path = Path(trainer.default_root_dir, "events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_logs_each_layer_at_its_own_step(make_trainer):
    _, logger, trainer = fit(make_trainer, max_steps=5, monitor={"every_n_steps": 2})
    assert [step for step, _ in logger.calls] == [0, 2, 4]
    metrics = ("attention_entropy", "attention_entropy_p5", "attention_collapsed", "attention_first")
    expected = {f"{metric}/blocks_{i}" for i in range(2) for metric in (*metrics, "attention_logit_max")}
    assert set(logger.calls[0][1]) == expected | {"attention_entropy/min"}
    assert trainer.callback_metrics["attention_entropy/min"] == logger.calls[-1][1]["attention_entropy/min"]


def test_values_are_those_of_an_explicit_softmax_over_all_micro_batches(make_trainer):
    class Explicit(TinyLM):
        def __init__(self):
            super().__init__()
            self.entropies, self.firsts, self.largest = [], [], []
            self.blocks[0].register_forward_hook(self.look)

        def look(self, block, args, output):
            q, k, _ = block.attention(args[0]).view(*args[0].shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4).double()
            t = q.size(2)
            s = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
            s = s.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            p = s.softmax(-1)
            h = -torch.special.xlogy(p, p).sum(-1)[..., 1:] / torch.arange(2, t + 1).log()
            self.entropies.append(h.mean((0, 2)))
            self.firsts.append(p[..., 1:, 0].mean())
            self.largest.append(s.amax())

    module = Explicit()
    _, logger, _ = fit(
        make_trainer, module, max_steps=2, accumulate_grad_batches=4, monitor={"per_head": True}
    )  # fmt: skip
    for step, (_, values) in enumerate(logger.calls):
        window = slice(4 * step, 4 * step + 4)
        heads = torch.stack(module.entropies[window]).mean(0)
        assert values["attention_entropy/blocks_0_head_0"] == pytest.approx(heads[0].item(), abs=1e-5)
        assert values["attention_entropy/blocks_0_head_1"] == pytest.approx(heads[1].item(), abs=1e-5)
        assert values["attention_entropy/blocks_0"] == pytest.approx(heads.mean().item(), abs=1e-5)
        assert values["attention_first/blocks_0"] == pytest.approx(sum(module.firsts[window]).item() / 4, abs=1e-5)
        assert values["attention_logit_max/blocks_0"] == pytest.approx(max(module.largest[window]).item(), abs=1e-5)


def test_validation_adds_up_over_the_whole_loader(make_trainer):
    monitor = AttentionEntropyMonitor()
    trainer = make_trainer(callbacks=[monitor])
    module = TinyLM()
    (whole,) = trainer.validate(module, loader(batch_size=64), verbose=False)
    (in_parts,) = trainer.validate(module, loader(batch_size=4), verbose=False)
    assert "attention_entropy/blocks_1" in whole
    assert in_parts == pytest.approx(whole, rel=1e-5)


def test_a_collapse_is_an_alarm_once_and_names_the_head(make_trainer):
    sharpness = [1.0] * 8 + [8.0] * 6
    with pytest.warns(UserWarning, match="attention collapses in .* below 0.5 of its running median") as seen:
        _, logger, trainer = fit(make_trainer, Sharp(sharpness), max_steps=14)
    entropies = logger.values("attention_entropy/blocks_1")
    assert entropies[8] < 0.5 * entropies[7]
    assert logger.values("attention_logit_max/blocks_1")[8] > 50
    first, *later = events(trainer)
    assert (first["step"], first["alarm"]) == (9, "entropy_collapse")
    assert {"blocks.1, head 0", "blocks.1, head 1"} <= set(first["where"])
    assert not any("blocks.1" in head for event in later for head in event["where"])
    said = [str(w.message) for w in seen if "attention collapses" in str(w.message)]
    assert len(said) == 1 + len(later)
    assert said[0].startswith("step 9: attention collapses in blocks.")


def test_one_measurement_is_no_collapse_and_enters_no_median(make_trainer):
    sharpness = [1.0] * 8 + [8.0] + [1.0] * 4
    monitor, _, trainer = fit(make_trainer, Sharp(sharpness), max_steps=13)
    assert events(trainer) == []
    assert [len(past) for name, past in monitor._past.values.items() if "blocks.1" in name] == [12, 12]


def test_heads_that_become_sharp_without_large_logits_are_healthy(make_trainer):
    """They learn what to look at; and what they have learnt becomes what is normal for them."""
    sharpness = [1.0] * 8 + [8.0] * 6
    monitor, _, trainer = fit(make_trainer, Sharp(sharpness), max_steps=14, monitor={"collapse_logit": 1e4})
    assert events(trainer) == []
    assert all(len(past) == 14 for past in monitor._past.values.values())


def test_attention_that_stays_uniform_is_an_alarm_once(make_trainer):
    with pytest.warns(UserWarning, match="after 8 steps most attention heads still attend to all their keys alike"):
        _, _, trainer = fit(make_trainer, Sharp([0.0] * 11), max_steps=11, monitor={"uniform_after": 6})
    (event,) = events(trainer)
    assert (event["step"], event["alarm"]) == (8, "attention_uniform")  # three in a row
    assert event["where"] == ["blocks.0", "blocks.1"]


def test_attention_that_leaves_uniform_in_time_is_no_alarm(make_trainer):
    _, _, trainer = fit(make_trainer, Sharp([0.0] * 8 + [1.0] * 3), max_steps=11, monitor={"uniform_after": 6})
    assert events(trainer) == []


@pytest.mark.parametrize(("sharpness", "match"), [(8.0, "step 9: attention collapses"), (0.0, "after 10 steps most")])
def test_a_resumed_monitor_judges_as_the_uninterrupted_one(make_trainer, tmp_path, sharpness, match):
    module = Sharp([1.0] * 8 + [sharpness] * 8)
    data = loader(n_samples=36)  # nine steps an epoch: what is wrong has begun when the checkpoint is written
    first = make_trainer(max_epochs=1, callbacks=[AttentionEntropyMonitor(1, uniform_after=8)])
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "nine.ckpt")
    resumed = make_trainer(max_steps=14, callbacks=[AttentionEntropyMonitor(1, uniform_after=8)])
    with pytest.warns(UserWarning, match=match):
        resumed.fit(module, data, ckpt_path=tmp_path / "nine.ckpt", weights_only=True)


class Flash(torch.autograd.Function):
    """Attention that no torch function shows."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FlashAttention(nn.Module):
    def forward(self, x):
        return Flash.apply(x)


class WithFlash(TinyLM):
    def __init__(self):
        super().__init__()
        self.blocks.append(nn.Sequential(nn.Linear(16, 16), FlashAttention()))


def test_attention_that_cannot_be_seen_is_named_once(make_trainer):
    with pytest.warns(UserWarning, match=r"cannot see into blocks\.2\.1: .* attn_implementation='sdpa'") as seen:
        _, logger, _ = fit(make_trainer, WithFlash(), max_steps=4)
    assert sum("cannot see into" in str(w.message) for w in seen) == 1
    assert "attention_entropy/blocks_0" in logger.calls[-1][1]


class NoAttention(TinyLM):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()


def test_a_model_without_attention_gets_one_line(make_trainer):
    with pytest.warns(UserWarning, match="saw no attention in this model") as seen:
        _, logger, _ = fit(make_trainer, NoAttention(), max_steps=4)
    assert sum("saw no attention" in str(w.message) for w in seen) == 1
    assert logger.calls == []


class Handwritten(nn.Module):
    """Softmax over scores, in a module that says attention; and one in a module that does not."""

    def __init__(self, three_dimensional):
        super().__init__()
        self.three_dimensional = three_dimensional

    def forward(self, q, k):
        scores = q @ k.transpose(-2, -1)
        return torch.softmax(scores.flatten(0, 1) if self.three_dimensional else scores, dim=-1)


class SelfAttention(Handwritten):
    pass


@pytest.mark.parametrize("three_dimensional", [False, True])
def test_a_softmax_counts_in_an_attention_module_only(make_trainer, three_dimensional):
    class Model(TinyLM):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()
            self.mixer, self.router = SelfAttention(three_dimensional), Handwritten(three_dimensional)

        def training_step(self, batch, batch_idx):
            q = torch.randn(2, 3, 5, 4)
            self.mixer(q, q)
            self.router(q, q)
            F.softmax(torch.randn(2, 3, 5), dim=1)
            return super().training_step(batch, batch_idx)

    _, logger, _ = fit(make_trainer, Model(), max_steps=1)
    assert {key for key in logger.calls[0][1] if "min" not in key} == {
        f"attention_{metric}/mixer" for metric in ("entropy", "entropy_p5", "collapsed", "first", "logit_max")
    }


@pytest.mark.parametrize(
    "options", [{"bias": True, "add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6}], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_agrees_with_its_own_weights(make_trainer, options, batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    size = (3, 5) if batch_first else (5, 3)
    query, key = torch.randn(*size, 8), torch.randn(*size, options.get("kdim", 8))
    value = torch.randn(*size, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = torch.ones(5, 5).triu(1).bool()

    class Model(TinyLM):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()
            self.attention = attention

        def training_step(self, batch, batch_idx):
            out, _ = self.attention(query, key, value, padding, need_weights=False, attn_mask=mask)
            return out.mean() * 0 + super().training_step(batch, batch_idx)

    _, weights = attention(query, key, value, padding, attn_mask=mask, average_attn_weights=False)
    _, logger, _ = fit(make_trainer, Model(), max_steps=1, monitor={"per_head": True})
    entropies = -torch.special.xlogy(weights, weights).sum(-1)
    visible = (weights > 0).sum(-1)
    keep = (visible > 1).clone()
    if weights.size(-1) == 5:
        keep[1, :, 3:] = False  # padded queries, recognisable where there are as many keys as queries
    normalised = entropies / visible.clamp(min=2).log()
    for head in range(2):
        expected = normalised[:, head][keep[:, head]].mean().item()
        assert logger.calls[0][1][f"attention_entropy/attention_head_{head}"] == pytest.approx(expected, abs=1e-5)
