"""A logger that raises or blocks does not stop training, and one that works does not notice."""

import copy
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from helpers import MemoryLogger, TinyLM, loader, make_trainer, says
from lit_callbacks import shield
from lit_callbacks._redaction import redacted


class Failing(Logger):
    """Raises in one method."""

    name, version = "failing", 0

    def __init__(self, where, folder, error=ConnectionError):
        super().__init__()
        self.where, self.folder, self.error = where, folder, error

    @property
    def save_dir(self):
        return str(self.folder)

    def _maybe(self, where):
        if where == self.where:
            raise self.error("no network")

    @property
    def experiment(self):
        self._maybe("experiment")
        return self

    def log_metrics(self, metrics, step=None):
        self._maybe("log_metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._maybe("log_hyperparams")

    def save(self):
        self._maybe("save")

    def finalize(self, status):
        self._maybe("finalize")


class LM(TinyLM):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss


def fit(logger, **options):
    torch.manual_seed(0)
    module = LM()
    make_trainer(logger=logger, max_steps=6, **options).fit(module, loader())
    return module


@pytest.mark.parametrize("error", [ConnectionError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["experiment", "log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_logger_that_raises_anywhere_does_not_stop_training(tmp_path, where, error):
    expected = fit(False)
    with says(rf"The logger Failing failed: {where} raised {error.__name__}: no network. Training goes on"):
        actual = fit(shield(Failing(where, tmp_path, error)))
    assert all(torch.equal(actual.state_dict()[name], value) for name, value in expected.state_dict().items())
    lost = tmp_path / "unlogged_metrics.jsonl"
    assert lost.exists() == (where == "log_metrics")
    if lost.exists():
        rows = [json.loads(line) for line in lost.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(6))
        assert all(float(row["metrics"]["train/loss"]) > 0 for row in rows)


def test_unshielded_it_does(tmp_path):
    with pytest.raises(ConnectionError):
        fit(Failing("log_metrics", tmp_path))


class Blocking(MemoryLogger):
    """Hangs in the second call until it is let go."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def log_metrics(self, metrics, step=None):
        if len(self.calls) == 1:
            self.go.wait(30)
        super().log_metrics(metrics, step)


def test_a_logger_that_blocks_is_not_waited_for_and_catches_up(tmp_path):
    logger = shield(Blocking(), patience=0.2)
    with says("The logger Blocking blocks: log_metrics takes longer than 0.2 s"):
        fit(logger)
    assert len(logger.calls) == 1
    logger.go.set()
    logger.finalize("success")
    assert [step for step, _ in logger.calls] == list(range(6))


def test_what_does_not_fit_into_the_queue_is_written_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_callbacks.shielding._WAITING", 2)
    logger = shield(Blocking(), patience=0.1)
    fit(logger)
    rows = [json.loads(line)["step"] for line in Path("unlogged_metrics.jsonl").read_text().splitlines()]
    logger.go.set()
    logger.finalize("success")
    assert sorted([*rows, *(step for step, _ in logger.calls)]) == list(range(6))
    assert rows


def test_of_a_row_that_is_lost_the_numbers_are_written_down_and_not_the_pictures(tmp_path):
    logger = shield(Failing("log_metrics", tmp_path))
    with says("Training goes on"):
        logger.log_metrics({"loss": torch.tensor(2.5), "picture": object()}, step=3)
    assert json.loads((tmp_path / "unlogged_metrics.jsonl").read_text()) == {"step": 3, "metrics": {"loss": "2.5"}}


def test_a_logger_that_works_sees_the_same_calls():
    plain, shielded = MemoryLogger(), shield(MemoryLogger())
    fit(plain)
    fit(shielded)
    assert plain.calls == shielded.calls
    assert type(shielded).__name__ == "MemoryLogger"
    assert shield(shielded) is shielded


def test_real_loggers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    csv = shield(CSVLogger(tmp_path / "csv"))
    board = shield(TensorBoardLogger(tmp_path / "board"))
    wandb = shield(WandbLogger(save_dir=tmp_path, offline=True), patience=60.0)
    fit([csv, board, wandb])
    assert "train/loss" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert any((tmp_path / "board").rglob("events*"))
    assert any((tmp_path / "wandb").glob("offline-run-*"))
    assert not isinstance(wandb.experiment, type(csv.experiment))


def test_copies_and_pickles_are_shielded_too(tmp_path):
    for copied in (pickle.loads(pickle.dumps(shield(MemoryLogger()))), copy.deepcopy(shield(MemoryLogger()))):
        assert isinstance(copied, MemoryLogger)
        assert shield(copied) is copied
    with pytest.raises(ValueError, match="patience must be above 0 seconds, got 0"):
        shield(MemoryLogger(), patience=0)


def test_secrets_do_not_reach_a_logger(monkeypatch):
    class Keep(MemoryLogger):
        def log_hyperparams(self, params, *args, **kwargs):
            self.params = params

    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    logger = shield(Keep())
    logger.log_hyperparams({"key": "0123456789abcdef", "pad_token": "<pad>", "inner": ["x0123456789abcdef"], "n": 3})
    assert logger.params == {
        "key": "<redacted: MY_API_KEY>", "pad_token": "<pad>", "inner": ["x<redacted: MY_API_KEY>"], "n": 3
    }  # fmt: skip


def test_redaction_copies_and_leaves_alone_what_is_no_secret():
    data = {"path": Path("a"), "short": "true", "nested": {"list": [1, ("abcdefgh",)]}}
    result = redacted(data, {"A_TOKEN": "abcdefgh", "B_KEY": "true", "HOME": "a"})
    assert result == {"path": Path("a"), "short": "true", "nested": {"list": [1, ("<redacted: A_TOKEN>",)]}}
    assert data["nested"]["list"][1] == ("abcdefgh",)
