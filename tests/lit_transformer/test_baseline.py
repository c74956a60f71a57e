"""check --baseline_steps: a model without attention, beside the recipe's."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_transformer import LitCausalLM, WarmupConstant
from lit_transformer.cli import main
from lit_transformer.commands.baseline import Baseline, FullyConnected, read
from lit_transformer.errors import UsageError
from tiny_config import CONFIG
from tiny_task import TINY, Blocks, trainer

LETTERS = "abcdefghij"
SAID = r"(\d+) steps: fully connected baseline ([\d.]+), this model ([\d.]+) \(validation loss, nats\)\."


def markov(length):
    """Each letter is followed by one of two, with the same probability: log 2 nats."""
    draw, text = random.Random(0), "a"
    while len(text) < length:
        text += LETTERS[(LETTERS.index(text[-1]) + draw.choice((1, 3))) % 10]
    return text


def copies(length):
    """Five letters again and again, and after some time five others."""
    draw = random.Random(0)
    return "".join("".join(draw.choices(LETTERS, k=5)) * 20 for _ in range(length // 100))


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """The command's code, the three numbers, and the findings."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(text, *words):
        Path("text.txt").write_text(text)
        try:
            main(["check", "--config", "config.yaml", *words])
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        said = capsys.readouterr()
        found = re.search(SAID, said.out)
        return code, found and [float(number) for number in found.groups()], said

    return run


def test_where_only_the_last_token_matters_both_are_as_good(check):
    code, (steps, baseline, model), said = check(markov(60_000), "--baseline_steps", "300")
    assert (code, steps) == (0, 300)
    assert baseline == pytest.approx(math.log(2), abs=0.02)
    assert model == pytest.approx(baseline, abs=0.1)
    assert ("worse-than-baseline" in said.out) == (model >= baseline)
    assert not Path("runs").exists()


def test_where_an_earlier_token_is_to_be_copied_attention_wins(check):
    heads = ["--model.init_args.config.d_model", "32", "--model.init_args.config.positions", "rotary"]
    code, (_, baseline, model), said = check(copies(60_000), "--baseline_steps", "400", *heads)
    assert code == 0
    assert model < baseline - 0.5
    assert "worse-than-baseline" not in said.out


def test_a_model_that_does_not_learn_is_found(check):
    stuck = ["--baseline_steps", "40", "--model.init_args.optimizer.init_args.lr", "0"]
    code, (_, baseline, model), said = check(copies(20_000), *stuck, "--silence", "[lr-zero]")
    assert code == 0
    assert baseline < 4 < model
    assert (
        f"warning worse-than-baseline: After 40 steps the validation loss is {model:.3f}, and {baseline:.3f}"
        in said.out
    )
    code, _, said = check(copies(20_000), *stuck, "--silence", "[lr-zero, worse-than-baseline]")
    assert "worse-than-baseline" not in said.out


def test_the_models_own_run_is_that_of_fit(tmp_path):
    def losses(*callbacks):
        torch.manual_seed(0)
        module = LitCausalLM(TINY, schedule=WarmupConstant(2))
        run = trainer(tmp_path, max_steps=5, callbacks=list(callbacks), accumulate_grad_batches=2, max_epochs=-1)
        run.fit(module, Blocks())
        (found,) = run.validate(module, Blocks(), verbose=False)
        return list(module.parameters()), found["val/loss"]

    baseline = Baseline(5)
    (weights, loss), (expected, _) = losses(baseline), losses()
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert baseline.model_loss == loss
    with torch.no_grad():
        batches = [read(batch) for batch in Blocks().val_dataloader()]
        nats = [
            F.cross_entropy(baseline.net(ids, mask).transpose(1, 2), t, reduction="none") for ids, mask, t in batches
        ]
    assert baseline.loss == pytest.approx(float(torch.cat(nats).mean()), rel=1e-5)  # the last batch is a smaller one


class Sentences(Blocks):
    """One class a sample, of three: which id is the most frequent one. Padding would mislead."""

    labels = ("a", "b", "c")

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.samples = []
        for i in range(120):
            ids = torch.randint(3, (8,), generator=draw).where(torch.arange(8) < 2, torch.tensor(i % 3))
            mask = (torch.arange(8) < 5).long()
            self.samples.append(
                {"input_ids": ids.where(mask == 1, 10), "attention_mask": mask, "labels": torch.tensor(i % 3)}
            )


class Classifier(LitCausalLM):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["input_ids"]).mean(1), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


def test_a_bag_of_words_where_there_is_one_target_a_sample(tmp_path):
    baseline = Baseline(60)
    run = trainer(tmp_path, max_steps=60, max_epochs=-1, callbacks=[baseline])
    run.fit(Classifier(TINY), Sentences())
    assert baseline.net.head.out_features == 3
    assert baseline.loss < 0.1


def test_padding_does_not_count():
    net = FullyConnected(5, 2, pooled=True)
    mask = torch.tensor([[1, 1, 0]])
    assert torch.equal(net(torch.tensor([[1, 2, 0]]), mask), net(torch.tensor([[1, 2, 4]]), mask))


IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (IDS, "got Tensor"),
        ({"input_ids": IDS}, "got input_ids (2, 3);"),
        ({"input_ids": IDS, "labels": IDS}, "got input_ids (2, 3), labels (2, 3);"),
        ({"input_ids": IDS, "targets": torch.zeros(2)}, "got input_ids (2, 3), targets (2,);"),
        ({"input_ids": IDS, "targets": IDS[:, :2]}, "got input_ids (2, 3), targets (2, 2);"),
        ({"input_ids": IDS, "decoder_input_ids": IDS, "targets": IDS}, "decoder_input_ids (2, 3), targets (2, 3);"),
    ],
)
def test_other_batches_are_refused(batch, got):
    with pytest.raises(UsageError, match="the baseline knows batches of input_ids") as refusal:
        read(batch)
    assert got in str(refusal.value)


def test_a_refusal_is_one_paragraph_of_the_command_line(check, monkeypatch):
    def collate(self):
        return DataLoader([{"input_ids": IDS[0], "labels": IDS[0], "targets": torch.tensor(0.5)}] * 40, batch_size=2)

    monkeypatch.setattr("lit_transformer.LanguageModelingData.train_dataloader", collate)
    monkeypatch.setattr(LitCausalLM, "training_step", lambda self, batch, _: self(batch["input_ids"]).mean())
    code, _, said = check(markov(20_000), "--baseline_steps", "5")
    assert code == 2
    assert said.err.rstrip().endswith("targets (2,); leave out --baseline_steps")
