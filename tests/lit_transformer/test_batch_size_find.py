"""batch_size_find: which sizes are tried, what is suggested, and what else is to be changed then."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lit_transformer import ClassificationData, LitCausalLM, LitClassifier, WarmupConstant
from lit_transformer.cli import main
from lit_transformer.commands import batch_size_find
from lit_transformer.commands.batch_size_find import Trials
from lit_transformer.commands.prepared import Enough
from lit_transformer.errors import UsageError
from tiny_config import CONFIG
from tiny_task import TINY, Blocks, trainer


@pytest.fixture
def find(tmp_path, monkeypatch, capsys):
    """The command on the tiny configuration: code, output and errors."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("text.txt").write_text("".join(f"the {i}th line of a text, which is long enough\n" for i in range(500)))

    def run(*words):
        try:
            main(["batch_size_find", "--config", "config.yaml", *words])
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def room_for(most, monkeypatch):
    """A device that has no room for larger batches."""
    step = LitCausalLM.training_step

    def training_step(self, batch, batch_idx):
        if len(batch["input_ids"]) > most:
            raise RuntimeError("CUDA out of memory.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitCausalLM, "training_step", training_step)


def tried(out):
    """The sizes, negative where they did not fit."""
    rows = re.findall(r"^ +(\d+) +([\d.]+ +[\d.]+|out of memory)$", out, re.MULTILINE)
    return [-int(size) if result == "out of memory" else int(size) for size, result in rows]


def test_it_tries_ever_larger_batches_and_leaves_nothing_behind(find):
    code, out, _ = find("--max_batch_size", "8")
    assert code == 0
    assert out.splitlines()[0] == "  batch   ms a step   samples a second"
    assert tried(out) == [1, 2, 4, 8]
    assert re.search(r"^Suggested: --data.init_args.batch_size [1248]$", out, re.MULTILINE)
    assert {path.name for path in Path().iterdir()} == {"config.yaml", "text.txt", "cache"}


def test_what_is_suggested_can_be_pasted(find):
    words = re.search(r"Suggested: (.*)", find("--max_batch_size", "2")[1])[1].split()
    main(["check", "--config", "config.yaml", *words])


def test_it_ends_between_what_fits_and_what_does_not(find, monkeypatch):
    room_for(21, monkeypatch)
    monkeypatch.setattr(batch_size_find, "fastest", max)  # as on a device
    code, out, _ = find()
    assert code == 0
    assert tried(out) == [1, 2, 4, 8, 16, -32, -24, 20, -22, 21]
    assert "Suggested: --data.init_args.batch_size 21" in out
    assert out.splitlines()[-1].startswith("A step then sees 21 samples on a device in place of 4:")


def test_accumulation_keeps_the_step(find, monkeypatch):
    room_for(3, monkeypatch)
    monkeypatch.setattr(batch_size_find, "fastest", max)
    out = find("--trainer.accumulate_grad_batches", "2")[1]
    assert tried(out) == [1, 2, -4, 3]
    assert out.splitlines()[-1] == (
        "With --trainer.accumulate_grad_batches 3 a step sees 9 samples on a device; the recipe has 8."
    )


def test_not_even_one_sample(find, monkeypatch):
    room_for(0, monkeypatch)
    code, out, error = find()
    assert (code, tried(out)) == (2, [-1])
    assert error.rstrip().endswith(
        "error: not even one sample fits: out of memory: CUDA out of memory. Three settings make a step smaller: "
        "data.init_args.batch_size (it is 1; trainer.accumulate_grad_batches keeps the batch), "
        "data.init_args.block_size (it is 32), and trainer.precision (it is 32-true; bf16-mixed needs less)"
    )


def test_wrong_words_are_explained(find):
    code, _, error = find("--max_batch_size", "0")
    assert (code, "max_batch_size must be at least 1, got 0" in error) == (2, True)
    code, _, error = find("--trainer.strategy", "ddp")
    assert (code, "expected a strategy of one device, got DDPStrategy: give --trainer.strategy auto" in error) == (
        2,
        True,
    )


def search(tmp_path, data):
    trials = Trials()
    run = trainer(tmp_path, max_steps=9, callbacks=[trials])
    module = LitCausalLM(TINY, schedule=WarmupConstant(2))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(Enough):
        run.fit(module, data)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    return trials


def test_it_ends_where_all_the_data_is_one_batch(tmp_path, capsys):
    trials = search(tmp_path, Blocks())
    assert list(trials.speeds) == [1, 2, 4, 8, 16, 24]
    assert capsys.readouterr().out.endswith("An epoch is one batch: larger ones are not tried.\n")


class Sizeless(Blocks):
    def __init__(self):
        super().__init__()
        self.samples_at_once = self.batch_size
        del self.batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.samples_at_once)


class Fixed(Blocks):
    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Sizeless, "expected a data module with a batch_size, got Sizeless, which has none"),
        (Fixed, "expected a batch of 1 from batch_size=1, got 4 samples"),
    ],
)
def test_data_whose_batches_cannot_be_changed(tmp_path, data, expected):
    run = trainer(tmp_path, max_steps=9, callbacks=[Trials()])
    with pytest.raises(UsageError, match=expected):
        run.fit(LitCausalLM(TINY, schedule=None), data())


def test_gradients_are_there_before_a_backward_pass():
    module = LitCausalLM(TINY)
    Trials().on_before_backward(None, module, None)
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (8, "The recipe has this size already."),
        (4, "With --trainer.accumulate_grad_batches 8 a step sees 32 samples on a device; the recipe has 32."),
        (5, "With --trainer.accumulate_grad_batches 7 a step sees 35 samples on a device; the recipe has 32."),
        (32, "With --trainer.accumulate_grad_batches 1 a step sees 32 samples on a device; the recipe has 32."),
        (33, "A step then sees 33 samples on a device in place of 32: the learning rate belongs to that number"),
    ],
)
def test_what_else_to_change(size, expected):
    trials = Trials()
    trials.configured, trials.accumulation = 8, 4
    assert trials.keep(size).startswith(expected)


def test_target_batch_tokens_keeps_the_step_by_itself(find, monkeypatch):
    monkeypatch.setattr(batch_size_find, "fastest", max)
    target = ["--model.init_args.target_batch_tokens", str(5 * 32)]
    kept = "target_batch_tokens keeps the tokens of a step, by accumulation."
    assert find("--max_batch_size", "2", *target)[1].splitlines()[-1] == kept
    above = find("--max_batch_size", "8", *target)[1].splitlines()[-1]
    assert above.startswith("A step then sees 8 samples on a device in place of 5:")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_largest_is_suggested_and_memory_is_shown(find):
    code, out, _ = find("--trainer.accelerator", "gpu", "--max_batch_size", "8")
    assert code == 0
    assert out.splitlines()[0].endswith("peak GiB")
    assert "Suggested: --data.init_args.batch_size 8" in out


def test_max_tokens_is_refused_for_it_decides_the_size(tmp_path):
    task = LitClassifier(TINY, num_labels=8)
    with pytest.raises(UsageError, match="leave max_tokens out to search for a batch_size"):
        trainer(tmp_path, callbacks=[Trials()]).fit(task, datamodule=ClassificationData(max_length=8, max_tokens=400))
