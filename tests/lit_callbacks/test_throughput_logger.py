"""Nothing here asserts how long something took, but for sleeps, which take at least as long as asked."""

import statistics
import time

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers import MemoryLogger, TinyLM, TwoOptimizers, loader
from lit_callbacks import ThroughputLogger
from lit_callbacks._batch import samples_and_tokens
from lit_callbacks._flops import FlopCount, compute_dtype
from lit_callbacks._stopwatch import Stopwatch

TOKENS = 4 * 9  # of a batch


def fit(make_trainer, module=None, data=None, callback=None, others=(), **options):
    callback, logger = callback or ThroughputLogger(every_n_steps=3), MemoryLogger()
    trainer = make_trainer(callbacks=[callback, *others], logger=logger, **{"max_steps": 8, **options})
    trainer.fit(module or TinyLM(), data or loader())
    return callback, logger


def test_reports_after_every_period_and_the_rest_at_the_end(make_trainer):
    _, logger = fit(make_trainer)
    assert [step for step, _ in logger.calls] == [2, 5, 7]
    assert logger.values("throughput/effective_batch_tokens") == {2: TOKENS, 5: TOKENS, 7: TOKENS}
    assert logger.values("throughput/total_tokens") == {2: 3 * TOKENS, 5: 6 * TOKENS, 7: 8 * TOKENS}


def test_rates_are_numbers_over_time(make_trainer):
    class Slow(TinyLM):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    _, logger = fit(make_trainer, Slow(), accumulate_grad_batches=2, max_steps=3)
    ((step, values),) = logger.calls
    assert step == 2
    assert values["throughput/effective_batch_tokens"] == 2 * TOKENS
    assert values["throughput/effective_batch_samples"] == 8
    assert values["throughput/step_time_p95"] >= values["throughput/step_time_p50"] >= 0.04
    assert values["throughput/tokens_per_second"] <= TOKENS / 0.02
    ratio = values["throughput/tokens_per_second"] / values["throughput/samples_per_second"]
    assert ratio == pytest.approx(9)


def test_waiting_for_data_is_told_from_working(make_trainer):
    class SlowData:
        def __iter__(self):
            for batch in loader():
                time.sleep(0.05)
                yield batch

    _, logger = fit(make_trainer, data=SlowData(), max_steps=6, others=[])
    shares = list(logger.values("throughput/data_wait_share").values())
    assert shares[-1] > 0.5
    _, logger = fit(make_trainer, others=[Sleeps("on_train_batch_start")], max_steps=6)
    assert list(logger.values("throughput/data_wait_share").values())[-1] < 0.5


class Sleeps(Callback):
    """Sleeps in a hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda *args: time.sleep(0.05))


def test_validation_does_not_count_in_a_fit(make_trainer):
    watch = ThroughputLogger(every_n_steps=1)
    logger = MemoryLogger()
    trainer = make_trainer(
        callbacks=[watch, Sleeps("on_validation_batch_end")], logger=logger, max_steps=6, val_check_interval=1
    )
    trainer.fit(TinyLM(), loader(), loader(n_samples=8))
    times = list(logger.values("throughput/step_time_p50").values())[1:]
    assert statistics.median(times) < 0.1, "each validation takes 0.1 s"


def test_flops_are_three_times_those_of_the_forward_pass(make_trainer):
    class Known(TinyLM):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()

        def loss(self, batch):
            x = self.embedding(batch["tokens"])  # 4 x 9 x 16
            q = self.hidden(x).view(4, 9, 2, 16).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, is_causal=True).mean()

    callback, logger = fit(make_trainer, Known(), max_steps=3)
    linear, attention = 2 * TOKENS * 16 * 32, 2 * 2 * (4 * 2) * 9 * 9 * 16
    assert callback._forward.total == linear + attention
    ((_, values),) = logger.calls
    rate = values["throughput/tokens_per_second"] / TOKENS * 3 * (linear + attention)
    assert values["throughput/model_tflops"] == pytest.approx(rate / 1e12, rel=1e-4)
    assert 0 < values["throughput/gemm_utilization"] < 1
    assert "throughput/mfu" not in values


def test_a_formula_that_fails_does_not_end_the_forward_pass(monkeypatch):
    from torch.utils import flop_counter

    def broken(*args, **kwargs):
        raise TypeError("no such shapes")

    monkeypatch.setitem(flop_counter.flop_registry, torch.ops.aten.mm, broken)
    count = FlopCount()
    assert (torch.ones(2, 3) @ torch.ones(3, 2)).sum() == 12
    torch.bmm(torch.ones(1, 2, 3), torch.ones(1, 3, 4))
    assert count.stop() == 2 * 2 * 3 * 4


def test_manual_optimization_has_no_flops(make_trainer):
    _, logger = fit(make_trainer, TwoOptimizers(), max_steps=6)
    assert "throughput/tokens_per_second" in logger.calls[0][1]
    assert "throughput/model_tflops" not in logger.calls[0][1]


def test_totals_go_on_over_resumes(make_trainer, tmp_path):
    first = make_trainer(max_epochs=1, callbacks=[ThroughputLogger(2)])
    first.fit(TinyLM(), loader(n_samples=20))  # five steps; the last is not reported yet when the checkpoint is written
    state = first.callbacks[0].state_dict()
    assert state["tokens"] == 5 * TOKENS
    first.save_checkpoint(tmp_path / "five.ckpt")
    logger = MemoryLogger()
    resumed = make_trainer(max_epochs=2, callbacks=[ThroughputLogger(2)], logger=logger)
    resumed.fit(TinyLM(), loader(n_samples=20), ckpt_path=tmp_path / "five.ckpt", weights_only=True)
    assert list(logger.values("throughput/total_tokens").values()) == [6 * TOKENS, 8 * TOKENS, 10 * TOKENS]
    hours = list(logger.values("throughput/training_hours").values())
    assert state["seconds"] / 3600 < hours[0] < hours[-1]


def test_a_checkpoint_in_the_middle_of_a_period_counts_every_token(make_trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(make_trainer, others=[Save()], max_steps=5)
    for step in range(1, 6):
        states = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["callbacks"]
        (state,) = states.values()
        assert state["tokens"] == step * TOKENS


class Pixels(TinyLM):
    def loss(self, batch):
        pixels, labels = batch
        return self.embedding(labels).mean() + pixels.mean()


def test_a_batch_without_token_ids_has_samples_only(make_trainer):
    data = DataLoader([(torch.zeros(5, 3, 4, 4), torch.zeros(5, dtype=torch.long))] * 4, batch_size=None)
    _, logger = fit(make_trainer, Pixels(), data, max_steps=3)
    values = logger.calls[0][1]
    assert values["throughput/effective_batch_samples"] == 5
    assert not any("tokens" in key for key in values)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 7, dtype=torch.int32), (3, 21)),
        ([torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)], (3, 21)),
        ({"labels": torch.zeros(2, 4, dtype=torch.long), "input_ids": torch.zeros(2, 9, dtype=torch.long)}, (2, 18)),
        ({"a": {"b": (torch.zeros(2, 5),)}}, (2, 0)),
        ("text", (0, 0)),
        (torch.tensor(1.0), (1, 0)),
    ],
    ids=str,
)
def test_what_is_in_a_batch(batch, expected):
    assert samples_and_tokens(batch) == expected


def test_a_stopwatch_does_not_count_while_paused(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch()  # at 0
    watch.begin_batch()  # at 1: waited for 1
    watch.end_batch()  # at 3
    watch.pause()  # at 10
    watch.go_on()  # at 11
    watch.begin_batch()  # at 12: waited for 9 - 1
    watch.end_step()  # at 14
    assert watch.waited == 1 + 8
    assert watch.step_times == [13.0]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)]
)
def test_the_dtype_of_matrix_products(make_trainer, precision, dtype):
    assert compute_dtype(make_trainer(precision=precision)) is dtype
