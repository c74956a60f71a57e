import json
import math
import types

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from helpers import MemoryLogger, TinyLM, assert_identical, loader, snapshot
from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    GradientNormLogger,
    LossCurve,
    NonFiniteGuard,
    ParameterStatsLogger,
    recommended,
)
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement, side_by_side, tensor_parallel


class Failing(Observer):
    """Counts its measurements and raises in the second one."""

    def __init__(self):
        super().__init__(every_n_steps=2)
        self.measured = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.cadence.due(trainer.global_step):
            self.report(trainer, pl_module, trainer.global_step, self.measure)

    def measure(self):
        self.measured += 1
        if self.measured == 2:
            raise ZeroDivisionError("there is nothing to divide")
        return Measurement({"failing/value": torch.tensor(1.0)})

    def summarise(self, total):
        return dict(total.sums)


def test_a_failing_measurement_is_switched_off_and_training_goes_on(make_trainer):
    failing, logger = Failing(), MemoryLogger()
    trainer = make_trainer(max_steps=9, callbacks=[failing], logger=logger)
    match = "Failing is off for the rest of this run, on all ranks: .* step 2 failed on rank 0 with ZeroDivisionError"
    with pytest.warns(UserWarning, match=match) as warned:
        trainer.fit(TinyLM(), loader())
    assert (trainer.global_step, failing.measured) == (9, 2)
    assert sum("is off" in str(warning.message) for warning in warned) == 1
    assert logger.calls == [(0, {"failing/value": 1.0})]

    trainer = make_trainer(max_steps=4, callbacks=[failing], logger=logger)
    trainer.fit(TinyLM(), loader())
    assert failing.measured == 4, "a new fit is a new chance"


def test_every_logger_gets_one_call_per_measured_step(make_trainer):
    loggers = [MemoryLogger(), MemoryLogger()]
    make_trainer(max_steps=7, callbacks=[GradientNormLogger(every_n_steps=3)], logger=loggers).fit(TinyLM(), loader())
    for logger in loggers:
        assert [step for step, _ in logger.calls] == [0, 3, 6]


def test_checkpoints_and_early_stopping_can_monitor_a_summary(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="grad_norm/total", every_n_train_steps=2, save_top_k=-1)
    stopping = EarlyStopping(monitor="grad_norm/total", stopping_threshold=100.0, check_on_train_epoch_end=True)
    trainer = make_trainer(
        max_epochs=5, callbacks=[GradientNormLogger(every_n_steps=1), checkpoint, stopping], enable_checkpointing=True
    )
    trainer.fit(TinyLM(), loader())
    assert trainer.current_epoch == 1
    assert len(checkpoint.best_k_models) == 8


class Other(Callback):
    """A callback of someone else."""


def test_our_callbacks_are_sorted_within_their_places(make_trainer):
    other, another = Other(), Other()
    guard, curve, norm = NonFiniteGuard(), LossCurve(), GradientNormLogger()
    trainer = make_trainer(max_steps=1, callbacks=[other, guard, curve, another, norm])
    before = trainer.callbacks
    trainer.fit(TinyLM(), loader())
    assert trainer.callbacks == [other, curve, norm, another, guard]
    assert before == [other, guard, curve, another, norm], "Lightning is iterating over this list"


@pytest.mark.filterwarnings("ignore:step .* the gradient is not finite")
def test_the_order_someone_wrote_does_not_matter(make_trainer, tmp_path):
    def everyone():
        return [
            AttentionEntropyMonitor(1), GradientNormLogger(1), NonFiniteGuard(), DeadNeuronDetector(1), LossCurve(1),
            ParameterStatsLogger(1), ActivationStatsMonitor(1),
        ]  # fmt: skip

    orders = [list(range(7)), list(range(7))[::-1], [3, 0, 6, 2, 5, 1, 4]]
    results = []
    for order in orders:
        torch.manual_seed(0)
        callbacks, logger, module = everyone(), MemoryLogger(), TinyLM(batch_norm=True)
        root = tmp_path / str(len(results))
        trainer = make_trainer(
            max_steps=8, callbacks=[callbacks[i] for i in order], logger=logger, default_root_dir=root
        )
        trainer.fit(module, loader(faults={21: "nan"}))
        numbers = {(step, key): value for step, metrics in logger.calls for key, value in metrics.items()}
        numbers |= dict(enumerate(callbacks[4].train.values))
        events = sorted((root / "events.jsonl").read_text().splitlines())
        results.append((snapshot(module, trainer), numbers, events))
    assert math.isnan(results[0][1][5, "grad_norm/total"])
    assert {json.loads(event)["event"] for event in results[0][2]} == {"skip", "alarm"}
    for state, numbers, events in results[1:]:
        assert_identical(state, results[0][0])
        assert numbers.keys() == results[0][1].keys()
        values = [torch.tensor([n[key] for key in results[0][1]]) for n in (numbers, results[0][1])]
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
        assert events == results[0][2]


NOT_SERVED = [
    pytest.param(name, callback, id=f"{name}-{type(callback).__name__}")
    for callback in recommended()
    for name in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
    if not (callback.serves_zero if name == "DeepSpeedStrategy" else callback.serves_shards)  # else test_strategies.py
]


@pytest.mark.parametrize(("name", "callback"), NOT_SERVED)
def test_what_a_callback_does_not_serve_is_refused_in_one_sentence(name, callback):
    bases = (DDPStrategy,) if name == "DeepSpeedStrategy" else ()
    trainer = types.SimpleNamespace(strategy=object.__new__(type(name, bases, {})), callbacks=[])
    with pytest.raises(ValueError, match=f"but not yet {name}. Use another strategy, or leave the callback out."):
        callback.setup(trainer, TinyLM(), "fit")


def test_heads_and_units_of_a_tensor_parallel_group_stand_side_by_side():
    fourth = types.SimpleNamespace(
        world_size=4, global_rank=3, distributed_sampler_kwargs={"num_replicas": 2, "rank": 1}
    )
    assert tensor_parallel(fourth) == (1, 2)
    assert side_by_side(fourth, torch.tensor([[1.0, 2.0]]), -1.0).tolist() == [[-1.0, -1.0], [1.0, 2.0]]
    alone = types.SimpleNamespace(world_size=1, global_rank=0, distributed_sampler_kwargs=None)
    assert side_by_side(alone, torch.tensor([3.0, 4.0])).tolist() == [3.0, 4.0]
