"""What is asked of the machine, against what is there."""

import pytest
from jsonargparse import Namespace

from lit_transformer.errors import UsageError
from lit_transformer.run.machine import check_machine


def asked(devices, accelerator="cpu", strategy="auto"):
    return Namespace(accelerator=accelerator, devices=devices, strategy=strategy)


@pytest.mark.parametrize("devices", [1, "2", "auto", -1, [0, 1]])
def test_what_is_there_is_taken_in_silence(devices):
    assert check_machine(asked(devices), cores=2) is None


def test_more_processes_than_cores_are_a_warning_and_far_more_a_mistake():
    expected = "trainer.devices is 3, on a CPU that many processes, and this machine has 2 cores: they will wait"
    assert check_machine(asked(3), cores=2).startswith(expected)
    assert check_machine(asked("16"), cores=2)
    with pytest.raises(UsageError, match="this machine has 2 cores; take at most 2"):
        check_machine(asked(17), cores=2)


def test_devices_of_other_kinds_are_not_counted_against_cores():
    assert check_machine(asked(64, accelerator="tpu"), cores=2) is None


@pytest.mark.parametrize("name", ["auto", "DDP", "fsdp2", "tensor_parallel", "deepspeed_stage_3_offload"])
def test_known_strategies(name):
    check_machine(asked(1, strategy=name))


def test_an_unknown_strategy_has_a_nearest_one_or_none():
    with pytest.raises(UsageError, match="no fsdp3, did you mean fsdp or fsdp2"):
        check_machine(asked(1, strategy="fsdp3"))
    with pytest.raises(UsageError, match=r"no quantum; there are auto, ddp, .*tensor_parallel"):
        check_machine(asked(1, strategy="quantum"))
