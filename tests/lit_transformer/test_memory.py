"""What `memory` counts, by hand and against what training really holds."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_optimizer import ScheduleFreeAdamW
from torch import nn

from hf_models import save_gpt2
from lit_transformer import LitCausalLM, MuonAdamW
from lit_transformer.commands.memory import activations, batch_shape
from lit_transformer.errors import UsageError
from lit_transformer.nn.blocks import repeated_blocks
from lit_transformer.nn.summary import summarize
from lit_transformer.strategies.memory import Held, Load, Room, held_by, optimizer_states, uses
from tiny_config import CONFIG
from tiny_task import TINY, Blocks

KIB = 1024
MATRIX = Held(Room((10, 256), 4), 0, True, True, (Room((), 4), Room((10, 256), 4), Room((10, 256), 4)))
OUTSIDE = Held(Room((4, 256), 4), None, False, True, (Room((), 4), Room((4, 256), 4), Room((4, 256), 4)))
FROZEN = Held(Room((2, 256), 4), None, False, False)


def found(load, devices, tensor=1):
    return {use.strategy: use for use in uses(load, devices, tensor)}


def test_by_hand():
    """10 + 4 + 2 rows of 1 KiB, of which the last 2 are frozen, on 4 devices."""
    load = Load([MATRIX, OUTSIDE, FROZEN], activations=7 * KIB, buffers=[100], keep_snapshots=3)
    by = found(load, 4)
    one = by["one device"]
    assert (one.parameters, one.gradients, one.states) == (16 * KIB, 14 * KIB, 28 * KIB + 8)
    assert one.total == (16 + 14 + 28 + 7) * KIB + 8
    # A snapshot: what is trained, two moments, two counters and a buffer in multiples of 64 bytes.
    assert one.snapshots == 3 * (3 * 14 * KIB + 2 * 64 + 128)
    assert by["ddp"].total == one.total + 14 * KIB  # buckets
    sharded = by["fsdp2"]  # 3 rows of 10, 1 of 4, 1 of 2
    assert (sharded.parameters, sharded.gradients, sharded.states) == (5 * KIB, 4 * KIB, 8 * KIB + 8)
    assert sharded.exchange == (2 * (4 + 2) + 3 * 10) * KIB
    assert sharded.activations == 7 * KIB
    assert by["fsdp_cpu_offload"].host == (5 + 4 + 8) * KIB + 8
    assert by["fsdp_cpu_offload"].total == by["fsdp2"].exchange + 7 * KIB
    first, second, third = (by[f"deepspeed_stage_{i}"] for i in (1, 2, 3))
    assert (first.parameters, first.gradients, first.states) == (16 * KIB + 3584, 14 * KIB, 7 * KIB)
    assert (second.parameters, second.gradients, second.states) == (16 * KIB + 3584, 3584, 7 * KIB)
    assert (third.parameters, third.gradients, third.states) == (4 * KIB + 3584, 3584, 7 * KIB)
    offloaded = by["deepspeed_stage_2_offload"]
    assert (offloaded.parameters, offloaded.gradients, offloaded.states) == (16 * KIB, 0, 0)
    assert offloaded.host == 3584 + 3584 + 7 * KIB
    assert by["deepspeed_stage_3_offload"].parameters == 0


def test_mixed_precision_halves_what_deepspeed_has():
    by = found(Load([MATRIX, OUTSIDE], activations=20 * KIB, is_mixed=True), 2)
    assert by["one device"].parameters == 14 * KIB
    assert by["deepspeed_stage_1"].parameters == 7 * KIB + 7 * KIB
    assert by["deepspeed_stage_1"].gradients == 7 * KIB
    assert by["deepspeed_stage_1"].activations == 15 * KIB  # without autocast's copy of the matrix


def test_tensor_parallelism_divides_matrices_and_what_they_make():
    use = found(Load([MATRIX, OUTSIDE], activations=9 * KIB, divided=6 * KIB), 4, tensor=2)["fsdp2, tensor 2"]
    assert use.parameters == 5 * KIB // 2 + 2 * KIB  # 5 rows of the matrix on each of 2, and half of them
    assert use.activations == 3 * KIB + 3 * KIB
    assert use.exchange == 2 * 4 * KIB + 3 * 5 * KIB
    with pytest.raises(ValueError, match="got 4 and 3"):
        uses(Load([MATRIX], activations=None), 4, tensor=3)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        partial(torch.optim.AdamW, amsgrad=True),
        partial(torch.optim.SGD, momentum=0.9),
        torch.optim.Adafactor,
        MuonAdamW,
        ScheduleFreeAdamW,
    ],
)
def test_states_are_those_of_a_real_step(optimizer):
    task = LitCausalLM(TINY, partial(optimizer, lr=1e-3))
    real = task.optimizer_factory(task.groups_to_train())
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    if optimizer is ScheduleFreeAdamW:
        real.train()
    real.step()
    with torch.device("meta"):
        empty = LitCausalLM(TINY, partial(optimizer, lr=1e-3))
    counted = optimizer_states(empty.optimizer_factory, empty.groups_to_train())
    for parameter, twin in zip(task.parameters(), empty.parameters(), strict=True):
        values = [value for value in real.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert [room.shape for room in counted[id(twin)]] == [tuple(value.shape) for value in values]
        assert [room.bytes for room in counted[id(twin)]] == [value.nbytes for value in values]


def test_activations_on_no_device_are_those_of_summarize():
    with torch.device("meta"):
        empty = LitCausalLM(TINY)
    whole = summarize(LitCausalLM(TINY).model, batch_size=4, length=8)
    assert sum(activations(empty, 4, 8, 8)) == whole.activation_bytes
    with torch.device("meta"):
        again = LitCausalLM({**vars(TINY), "activation_checkpointing": 1})
    assert sum(activations(again, 4, 8, 8)) == whole.checkpointed_bytes


def test_blocks_of_a_foreign_model_are_found():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict(
        {
            "embeddings": nn.ModuleList([nn.Embedding(3, 8)]),
            "body": nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
        }
    )
    assert [type(block) for block in repeated_blocks(model)] == [nn.TransformerEncoderLayer] * 3
    held = held_by(model, {})
    assert [h.block for h in held][:2] == [None, 0]
    assert sum(h.is_cut for h in held) == 3 * 3  # out_proj, linear1, linear2; in_proj is no layer of its own


@pytest.fixture
def memory(cli):
    """Run the command."""
    return partial(cli, "memory", "--config", "config.yaml")


def cells(out):
    """Numbers by strategy and column."""
    header, *rows = [line for line in out.splitlines() if line.count("  ") > 8]
    columns = header.split()[1:]
    return {row[:26].strip(): dict(zip(columns, row[26:].split(), strict=True)) for row in rows}


def test_the_command_counts_without_making_anything(memory):
    """Blocks as those of a 7B: 32 (12 d^2 + 2 d); a norm, 256 bytes and 32 places."""
    large = ["--model.init_args.config.d_model", 4096, "--model.init_args.config.n_layers", 32]
    large += ["--model.init_args.config.n_heads", 32, "--model.init_args.config.bias", "false"]
    code, out, _ = memory(*large, "--devices", 64, "--gib", 40)
    assert code == 0
    n = 32 * (12 * 4096**2 + 2 * 4096) + (1 + 256 + 32) * 4096
    first = out.splitlines()[0]
    assert f"LitCausalLM, {n:,} parameters, precision 32-true (as configured), a batch of 4 x 32 on each" in first
    assert "64 devices, as asked for" in first
    by = cells(out)
    gib = n * 4 / 2**30
    assert float(by["one device"]["parameters"].replace(",", "")) == pytest.approx(gib, abs=0.01)
    assert float(by["fsdp2"]["states"]) == pytest.approx(2 * gib / 64, abs=0.01)
    assert by["ddp"]["exchange"] == by["ddp"]["gradients"]
    assert "The first to fit 40 GiB is fsdp2, with" in out
    assert "5 snapshots of LossSpikeRecovery" in out


def test_the_command_knows_models_of_hugging_face(memory, tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", vocab_size=256)
    Path(folder, "model.safetensors").unlink()  # the configuration is enough
    config = CONFIG | {"model": {"class_path": "lit_transformer.LitPretrained", "init_args": {"path": folder}}}
    Path("config.yaml").write_text(yaml.safe_dump(config | {"loss_spike_recovery": None}))
    code, out, error = memory("--gib", 0.00001)
    assert code == 0, error
    assert "8 devices, none being configured" in out
    by = cells(out)
    assert by["one device"]["activations"] != "?"
    assert by["one device"]["snapshots"] == "0.00"
    assert "None fits 1e-05 GiB" in out


def test_bad_words_are_one_sentence(memory):
    for words, said in (
        (("--devices", 0), "devices must be at least 1, got 0"),
        (("--devices", 4, "--tensor_parallel", 3), "must be a divisor of the number of devices, which is 4, got 3"),
        (("--gib", -1), "gib must be above 0, got -1"),
        (("--trainer.max_stepz", 3), "max_stepz"),
    ):
        code, out, error = memory(*words)
        assert (code, out) == (2, ""), words
        assert said in error


def test_data_of_unknown_size_is_refused():
    data = Blocks()
    assert batch_shape(data) == (4, 8, 8)
    data.max_tokens = 50
    assert batch_shape(data) == (6, 8, 8)
    del data.batch_size
    with pytest.raises(UsageError, match="expected a data module with batch_size and with block_size or max_length"):
        batch_shape(data)
