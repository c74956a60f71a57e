"""What only a GPU can show; each test skips itself without one."""

import pytest
import torch

from helpers import MemoryLogger, TinyLM, assert_identical, loader, snapshot
from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    GradientNormLogger,
    LossSpikeRecovery,
    ParameterStatsLogger,
    ThroughputLogger,
)
from lit_callbacks.rules import RobustRule
from lit_callbacks.testing import Fault, FaultInjector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def observers():
    return [
        GradientNormLogger(1),
        AttentionEntropyMonitor(1),
        DeadNeuronDetector(1, window_tokens=1),
        ActivationStatsMonitor(1),
        ParameterStatsLogger(1),
        ThroughputLogger(2),
    ]


def fit(make_trainer, callbacks, dropout=0.1, **options):
    torch.manual_seed(0)
    module, logger = TinyLM(dropout=dropout), MemoryLogger()
    trainer = make_trainer(
        accelerator="gpu", devices=1, max_steps=6, callbacks=callbacks, logger=logger, deterministic=True, **options
    )
    trainer.fit(module, loader())
    return module, trainer, logger


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_observers_measure_and_change_nothing(make_trainer, monkeypatch, precision):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    callbacks = observers()
    watched, trainer, logger = fit(make_trainer, callbacks, precision=precision)
    assert not any(callback.off for callback in callbacks)
    keys = {key for _, values in logger.calls for key in values}
    assert {"grad_norm/total", "attention_entropy/blocks_0", "dead_neurons/head", "throughput/gpu_memory_gib"} <= keys
    plain, plain_trainer, _ = fit(make_trainer, [], precision=precision)
    assert_identical(snapshot(watched, trainer), snapshot(plain, plain_trainer))


def test_the_values_are_those_of_the_cpu(make_trainer, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    *_, on_gpu = fit(make_trainer, observers()[:-1], dropout=0.0)
    torch.manual_seed(0)
    on_cpu = MemoryLogger()
    make_trainer(max_steps=6, callbacks=observers()[:-1], logger=on_cpu).fit(TinyLM(), loader())
    for (step, values), (expected_step, expected) in zip(on_gpu.calls[:5], on_cpu.calls[:5], strict=True):
        assert step == expected_step == 0
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_recovery_is_exact(make_trainer, monkeypatch, precision):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def run(faults, without=()):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1, lr=1e-3)
        recovery = LossSpikeRecovery(RobustRule(window=20, least=10), snapshot_every_n_steps=10, prove_steps=5)
        trainer = make_trainer(
            accelerator="gpu", devices=1, max_epochs=1, callbacks=[recovery, FaultInjector(faults)], deterministic=True,
            precision=precision,
        )  # fmt: skip
        trainer.fit(module, loader(n_samples=160, without=without))
        return snapshot(module, trainer), recovery.state_dict()["report"]["history"]

    bad, history = run([Fault("nan_loss", step=12), Fault("nan_weight", step=27)])
    assert history[0] == [12, "skip"]
    assert history[-1][1] == "rollback"
    good, _ = run([], without=[12, *range(21, history[-1][0] + 1)])
    assert_identical(bad, good)
