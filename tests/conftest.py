"""Every test starts from the same seed, on one thread, without Lightning's greetings."""

import functools
import logging
import sys

import pytest
import torch

import helpers

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
