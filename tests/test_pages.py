"""The pages played from top to bottom, each in a folder of its own: every block and every command, with tiny models."""

import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import lit_callbacks
from lit_transformer.cli import main

REPOSITORY = Path(__file__).parents[1]
TINY = {
    "trainer": {
        "max_steps": 4,
        "val_check_interval": 1,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "accumulate_grad_batches": 1,
    },
    "data": {"init_args": {"batch_size": 4, "bpe_vocab_size": 258}},
}
SHAPE = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": None}
OURS = {"model": {"init_args": {"config": SHAPE, "schedule": {"init_args": {"warmup": 0.25}}}}}


STEP = re.compile(
    r"^```(python|yaml|bash)\n(.*?)^```|^ {4,}(?:\$ )?(python (?:cli|-m lit_callbacks|examples)[^\n]*)$", re.M | re.S
)

# For processes of their own, those that Lightning starts by the same words included.
CLI = f"""
import sys
import lit_callbacks, lit_transformer  # folders of tests have the same names
sys.path.append({str(REPOSITORY / "tests")!r})
from lit_transformer.cli import main
from test_pages import short
main(short(sys.argv[1:]))
"""


class Step(NamedTuple):
    """Something a page says to do."""

    kind: str
    text: str
    before: str
    """The sentence before it."""


def steps(page: Path) -> Iterator[Step]:
    """Blocks and commands, in order."""
    text = page.read_text(encoding="utf-8")
    for found in STEP.finditer(text):
        if found[1]:
            yield Step(found[1], found[2], text[: found.start()])
        else:
            yield Step("command", found[3].partition("  #")[0], text[: found.start()])


class ShortTrainer(lightning.pytorch.Trainer):
    """Of blocks that leave out how long to train."""

    def __init__(self, **settings):
        if not settings.keys() & {"max_steps", "max_epochs"}:
            settings |= {"max_steps": 90, "max_epochs": -1}
        super().__init__(**settings | {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False})


class Module(BoringModel):
    """Anybody's."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self.step(batch)))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """What a reader is supposed to have: texts, tables, a Hugging Face model, `cli.py`."""
    from hf_models import save_bert

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(lightning.pytorch, "Trainer", ShortTrainer)
    for name in ("my/texts/a", "my/texts/b", "pairs", "new", "mine", "FOLDER"):
        Path(name).mkdir(parents=True)
    for part, lines in (("a", range(1500)), ("b", range(1500, 2500))):
        Path(f"my/texts/{part}/text.txt").write_text("".join(f"the {i}th line of a text, long enough\n" for i in lines))
    rows = [(f"w{i % 9} w{i % 7} w{i % 5}", f"{i % 2}") for i in range(60)]
    table("my/table.csv", ("text", "label"), rows)
    table("new/table.csv", ("text",), [row[:1] for row in rows])
    table("mine/table.csv", ("comment", "topic"), rows)
    table("pairs/table.csv", ("source", "target"), [(f"word {i % 9}", f"{i % 9} drow") for i in range(80)])
    save_bert("FOLDER")
    trainer = ShortTrainer(max_steps=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(BoringModel(), BoringDataModule())
    trainer.save_checkpoint("last.ckpt")
    Path("cli.py").write_text(CLI)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    Path("tiny_pretrained.yaml").write_text(yaml.safe_dump(TINY | {"data": {"init_args": {"max_length": 32}}}))
    Path("tiny_model.yaml").write_text(yaml.safe_dump(TINY | OURS))
    return tmp_path


def table(path, header, rows):
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def play(page: Path) -> int:
    """Do all that a page says; how many things that were."""
    names = {name: getattr(lit_callbacks, name) for name in lit_callbacks.__all__}
    module, data = Module(), BoringDataModule()
    names |= {"__name__": "page", "torch": torch, "module": module, "data": data, "Trainer": ShortTrainer}
    done = list(steps(page))
    for step in done:
        if step.kind == "yaml":
            Path(re.findall(r"`(\w+\.yaml)`", step.before)[-1]).write_text(step.text)
    for step in done:
        print(f"{page.name}: {step.text}", flush=True)
        if step.kind == "python":
            exec(compile(step.text, f"{page.name}: {step.text}", "exec"), names)
        elif step.kind == "bash":
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is this one
            subprocess.run(["bash", "-ec", step.text], check=True, timeout=200, env=os.environ | {"PATH": path})
        elif step.kind == "command":
            run(shlex.split(step.text))
    return len(done)


def run(words: list[str]) -> None:
    """A command, made short."""
    _, program, *words = words[: words.index(">")] if ">" in words else words
    if "fit" in words and any("strategy/" in word for word in words):
        command = [sys.executable, "-W", "ignore", program, *words, "--trainer.devices=2"]
        subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return
    try:
        if program == "cli.py":
            main(short(words))
        elif program == "-m":
            call(runpy.run_module, *words)
        else:
            call(runpy.run_path, program, *words)
    except SystemExit as exit_:
        code = exit_.code
    else:
        code = 0
    assert not code, words


def call(run_as_main, name: str, *words: str) -> None:
    """A program, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        run_as_main(name, run_name="__main__")


def short(words: list[str]) -> list[str]:
    """The same, over in seconds: what is small comes behind the page's files and before its flags."""
    if words[0] in ("generate", "report", "export", "consolidate", "memory", "dashboard", "check"):
        return words
    if "--config" in words:
        tiny = "tiny_pretrained.yaml" if "finetune_classifier" in words else "tiny_model.yaml"
        last = max(place for place, word in enumerate(words) if word == "--config") + 2
        return [*words[:last], "--config", tiny, *words[last:]]
    if "--ckpt_path" in words:
        return [*words, "--trainer.max_steps", "8"] if words[0] == "fit" else words
    return [words[0], "--config", "default", "--config", "tiny_model.yaml", *words[1:]]


QUICK = ("README.md", "callbacks/README.md", "docs/reliability.md", "docs/your_module.md")
LONG = ("docs/README.md", "docs/recipes.md", "docs/real_data.md", "docs/start.md", "docs/strategies.md")


@pytest.mark.filterwarnings("ignore")  # there is advice for small examples
@pytest.mark.parametrize("page", [*QUICK, *(pytest.param(page, marks=pytest.mark.slow) for page in LONG)])
def test_a_page_can_be_played(page, stage):
    assert play(REPOSITORY / page) > 1


def test_every_page_with_something_to_do_is_played():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "callbacks").glob("*.md")]
    assert {str(page.relative_to(REPOSITORY)) for page in pages if list(steps(page))} == {*QUICK, *LONG}
