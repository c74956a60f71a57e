"""Somebody at a terminal adds Dashboard to a project with a WandbLogger, and has neither an API key nor a network."""

import os
import subprocess
import sys
import threading
import time

import pytest

from wandb_file import WandbFile

pty = pytest.importorskip("pty", reason="there are no such terminals on this system")

FIT = """
from lightning.pytorch.loggers import WandbLogger
from helpers import TinyLM, loader, make_trainer
from lit_callbacks import Dashboard
logger = WandbLogger({arguments})
make_trainer(max_steps=4, logger=logger, callbacks=[Dashboard()]).fit(TinyLM(), loader())
logger.experiment.finish()
"""
QUESTION = b"Enter your choice"


def at_a_terminal(folder, arguments, seconds=120, **settings):
    """The exit code of a fit, None where it waits for an answer, and what is on the screen."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    nowhere = {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", FIT.format(arguments=arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**keep, **nowhere, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), **settings},
    )
    os.close(theirs)
    screen = bytearray()

    def read():
        try:
            while part := os.read(own, 4096):
                screen.extend(part)
        except OSError:  # how Linux says that the other side has gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        end = time.monotonic() + seconds
        while process.poll() is None and QUESTION not in screen and time.monotonic() < end:
            time.sleep(0.05)
        return process.poll(), bytes(screen)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(own)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "settings"), [("offline=True", {}), ("", {"WANDB_MODE": "offline"})])
def test_a_run_that_is_asked_to_be_offline_asks_nothing_and_has_the_verdict(arguments, settings, tmp_path):
    code, screen = at_a_terminal(tmp_path, arguments, **settings)
    assert QUESTION not in screen
    assert code == 0, screen.decode()
    assert WandbFile(tmp_path).summary["health/verdict"]


@pytest.mark.slow
def test_without_that_wandb_asks_before_any_callback_is_called(tmp_path):
    code, screen = at_a_terminal(tmp_path, "")
    assert QUESTION in screen, screen.decode()
    assert code is None, "it waits for the answer"
