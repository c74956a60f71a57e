"""The files of a run: folder, metrics, configuration errors, precision, loggers."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_callbacks.checkpointing.manifest import Manifest, contents
from lit_transformer.commands.checkpoints import find_run, locate, resume_point
from lit_transformer.errors import UsageError
from lit_transformer.run import wandb_server
from lit_transformer.run.config_errors import explain
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.loggers import make_loggers
from lit_transformer.run.metrics_file import MetricsFile, cut_back, read_metrics
from lit_transformer.run.precision import choose_precision
from lit_transformer.run.wandb_server import why_offline


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("LIT_TRANSFORMER_RUN", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def finished_run(root, name):
    run = RunFolder.create(root, name)
    run.config.touch()
    (run.checkpoints / "last.ckpt").touch()
    return run


def test_runs_made_up_in_the_same_second_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    names = []
    for _ in range(3):
        monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
        names.append(RunFolder.create(tmp_path, None).path.name)
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_a_launched_process_shares_the_folder_of_the_first(tmp_path, monkeypatch):
    first = RunFolder.create(tmp_path, None)
    first.config.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert RunFolder.create(tmp_path, None).path == first.path


def test_several_processes_started_from_outside_need_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="add --run NAME"):
        RunFolder.create(tmp_path, None)
    finished_run(tmp_path, "a")  # rank 1 comes after rank 0 has begun to write
    RunFolder.create(tmp_path, "a")


def commit(run, step, saved_at, name="step"):
    """A checkpoint with a manifest."""
    path = run.checkpoints / f"{name}={step}.ckpt"
    path.write_text(f"weights of step {step}")
    environment = {"saved_at": saved_at}
    manifest = Manifest(step, 0, 1, "run", "owner", float(-step), None, environment, contents(path))
    manifest.write(path)
    return path


def test_without_a_name_it_is_the_run_that_saved_last_by_its_own_account(tmp_path):
    first, second = finished_run(tmp_path, "a"), finished_run(tmp_path, "b")
    commit(first, 5, saved_at=20.0)
    os.utime(commit(second, 9, saved_at=10.0), (2e9, 2e9))  # a file from the future
    assert find_run(tmp_path, None).path.name == "a"
    assert find_run(tmp_path, "b").path.name == "b"


def test_what_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(UsageError, match="nothing to resume or evaluate: no run under"):
        find_run(tmp_path, None)
    run = finished_run(tmp_path, "a")
    with pytest.raises(UsageError, match=r"no run in .*/x; the runs there are a"):
        find_run(tmp_path, "x")
    with pytest.raises(UsageError, match=r"none of them can be trusted.*\n.*last.ckpt: it has no manifest"):
        resume_point(run)
    (run.checkpoints / "last.ckpt").unlink()
    assert resume_point(run) is None
    with pytest.raises(UsageError, match=r"has no last checkpoint"):
        locate(tmp_path, "a", "last")


def test_the_best_checkpoint_that_verifies(tmp_path):
    run = finished_run(tmp_path, "a")
    commit(run, 7, 0.0)
    older, best = commit(run, 5, 0.0, "best-step"), commit(run, 6, 0.0, "best-step")
    assert locate(tmp_path, "a", "best") == best
    best.write_text("other weights")
    assert locate(tmp_path, "a", "best") == older
    assert locate(tmp_path, "a", "last").name == "step=7.ckpt"


def test_an_empty_run_is_removed_and_one_with_anything_in_it_is_not(tmp_path):
    RunFolder.create(tmp_path, "a").remove_if_empty()
    assert not (tmp_path / "a").exists()
    run = finished_run(tmp_path, "b")
    run.remove_if_empty()
    assert (run.checkpoints / "last.ckpt").exists()


def test_metrics_are_appended_and_read_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train/loss": 2.5, "epoch": 0}, step=4)
    file.log_metrics({"train/loss": torch.tensor(2.25), "val/loss": 3.0}, step=9)
    file.log_metrics({"val/loss": float("nan")}, step=10)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,key,value",
        "4,train/loss,2.5",
        "9,train/loss,2.25",
        "9,val/loss,3",
        "10,val/loss,nan",
    ]
    assert read_metrics(tmp_path / "metrics.csv")["train/loss"] == [(4, 2.5), (9, 2.25)]


def test_a_resumed_run_cuts_the_metrics_back_to_where_it_starts_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,key,value\n4,a,1\n9,a,2\n10,a,3\n12,a")
    metrics = MetricsFile(path, resume_step=10)
    assert path.read_text() == "step,key,value\n4,a,1\n9,a,2\n10,a,3\n12,a", "no step may be left to make"
    metrics.log_metrics({"a": 5.0}, step=10)
    metrics.log_metrics({"a": 6.0}, step=12)
    assert path.read_text().splitlines() == ["step,key,value", "4,a,1", "9,a,2", "10,a,5", "12,a,6"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["", "st", "step,key,value", "step,key,value\n0,a,1.2"])
def test_a_file_torn_in_its_first_line_gets_its_header(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    path.write_text(torn)
    assert read_metrics(path) == {}
    MetricsFile(path, resume_step=0).log_metrics({"a": 5.0}, step=0)
    assert path.read_text().splitlines() == ["step,key,value", "0,a,5"]


def test_cutting_back_what_is_not_there_is_no_error(tmp_path):
    cut_back(tmp_path / "metrics.csv", 3)
    assert not any(tmp_path.iterdir())


class Inner:
    def __init__(self, width: int = 4):
        self.width = width


def parser_message(*words):
    """What jsonargparse itself says."""

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            raise RuntimeError(message)

    parser = Parser()
    parser.add_argument("--inner", type=Inner | None, default=None)
    parser.add_argument("--steps", type=int, default=1)
    with pytest.raises(RuntimeError) as caught:
        parser.parse_args(words)
    return explain(str(caught.value), ["inner", "steps"])


def test_jsonargparse_reports_become_one_sentence():
    assert parser_message("--stepz", "3") == "unknown key stepz; did you mean steps?"
    assert parser_message("--steps", "x") == "steps must be of type int, got x"
    assert parser_message("--inner", f"{__name__}.Innr").startswith(f"inner: no class {__name__}.Innr")


def test_what_is_not_recognised_is_passed_on_in_one_line():
    assert explain("something\n  quite new") == "something quite new"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
        ({"avx2": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_precision_follows_the_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    precision, reason = choose_precision("cpu")
    assert precision == expected
    assert "this processor has" in reason


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_follows_the_gpu(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    precision, reason = choose_precision("auto")
    assert precision == expected
    assert "Some GPU" in reason


def test_the_same_wandb_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder.create(tmp_path, "a")
    first = make_loggers(run, MetricsFile(run.metrics), wandb=True, tensorboard=False, configured=None)[1]
    second = make_loggers(run, MetricsFile(run.metrics, 5), wandb=True, tensorboard=False, configured=None)[1]
    assert first.version == second.version == run.wandb_id.read_text()


@pytest.fixture
def server():
    """Something that takes connections, and the address of something that does not."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
        other.close()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", f"http://127.0.0.1:{closed}"


def test_wandb_is_offline_unless_there_is_a_key_and_a_server_that_answers(server, tmp_path, monkeypatch):
    keys = tmp_path / "netrc"
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(keys))
    up, down = server
    monkeypatch.setenv("WANDB_BASE_URL", up)
    assert "no API key" in why_offline()
    keys.write_text(f"machine {up.removeprefix('http://')} login user password {'x' * 40}\n")
    assert why_offline() is None
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", down)
    assert why_offline() == "127.0.0.1 does not answer"
    monkeypatch.setenv("https_proxy", up)  # then the proxy is whom W&B asks
    assert why_offline() is None
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE" in why_offline()


@pytest.mark.parametrize("host", ["api.wandb.ai", "default"])
def test_a_key_is_found_for_the_server_of_this_version_and_for_the_former(host, server, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_server, "_default_server", lambda: server[0])
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    machine = server[0].removeprefix("http://") if host == "default" else host
    (tmp_path / "netrc").write_text(f"machine {machine} login user password {'x' * 40}\n")
    assert why_offline() is None


def test_loggers_of_the_configuration_come_after_ours(tmp_path):
    run, own = RunFolder.create(tmp_path, "a"), MetricsFile(Path("own.csv"))
    assert make_loggers(run, MetricsFile(run.metrics), wandb=False, tensorboard=False, configured=own)[1:] == [own]
    assert make_loggers(run, MetricsFile(run.metrics), wandb=False, tensorboard=False, configured=[own])[1:] == [own]
    assert len(make_loggers(run, MetricsFile(run.metrics), wandb=False, tensorboard=False, configured=None)) == 1
