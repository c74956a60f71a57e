"""Activation checkpointing and torch.compile change no loss, whatever the strategy."""

from pathlib import Path

import pytest

from helpers import two_ranks
from variants_worker import VARIANTS, losses


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    return losses(tmp_path_factory.mktemp("plain"), text, "single")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tensor_parallel", "fsdp", "zero2", "zero3"])
def test_variants_have_the_losses_of_the_plain_run_on_one_device(strategy, plain, text, tmp_path):
    first, second = two_ranks(Path(__file__).with_name("variants_worker.py"), tmp_path, strategy, strategy, text)
    refused = {
        "tensor_parallel": "compile_model and activation_checkpointing do not go together",
        "zero3": "compile_model does not go with DeepSpeed's stage 3",
    }
    assert first["refused"].startswith(refused.get(strategy, "")), first["refused"]
    assert bool(first["refused"]) == (strategy in refused)
    for name in VARIANTS if strategy != "zero3" else VARIANTS[:1]:
        together = {step: (loss + second[name][step]) / 2 for step, loss in first[name].items()}
        assert together == pytest.approx(plain, rel=1e-5), name
    assert first.get("graphs", 1) >= 1
