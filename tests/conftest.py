"""Every test starts from the same seed, on one thread, without Lightning's greetings."""

import functools
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import helpers
from tiny_config import CONFIG

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """What the tests prepare goes with them; the standard library is prepared once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_open_wandb_run():
    yield
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()


@pytest.fixture
def make_trainer(tmp_path):
    """`helpers.make_trainer`, with the run folder in the test's own."""
    return functools.partial(helpers.make_trainer, default_root_dir=tmp_path)


class Outcome(NamedTuple):
    """Of a command."""

    code: int
    out: str
    error: str


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder that holds config.yaml and text.txt."""
    from lit_transformer.cli import main  # the tests of lit_callbacks do without

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("text.txt").write_text("".join(f"the {i}th line of a text, which is long enough\n" for i in range(500)))

    def call(*words):
        capsys.readouterr()
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with something to learn in it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    return str(path)
