"""An offline run that was resumed is two files; what does ``wandb sync`` make of them?"""

import json
import os
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import WandbLogger

from helpers import TinyLM, loader, make_trainer
from lit_callbacks import Dashboard, GradientNormLogger
from wandb_double import VIEWER, serving

KEY = "grad_norm/total"


class Server:
    """Keeps the history of one run, as W&B does: a row for each ``_step``."""

    def __init__(self):
        self.rows, self.address = {}, ""

    def answer(self, name, request):
        project = {"id": "3", "name": "p", "entity": {"id": "1", "name": "me"}}
        run = {"id": "2", "name": "abcd", "displayName": "x", "historyLineCount": len(self.rows), "project": project}
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": run, "inserted": not self.rows}}
        if name == "RunResumeStatus":
            tail = [json.dumps(self.rows[max(self.rows)])] if self.rows else []
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyTail": json.dumps(tail), "eventsTail": "[]"}
            known = {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": {**run, **counts, **known} if self.rows else None}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.address}/up"} for file in request["variables"]["files"]]
            return {"createRunFiles": {"runID": "2", "uploadHeaders": [], "files": files}}
        if name == "file_stream":
            for line in request.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                row = json.loads(line)
                self.rows[row["_step"]] = row
            return {"limits": {}}
        return VIEWER if name == "Viewer" else {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_one_command_appends_the_second_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it for the rest of the process
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    last = None
    for steps in (4, 7):
        logger = WandbLogger(offline=True, id="abcd", project="p", save_dir=tmp_path)
        callbacks = [GradientNormLogger(every_n_steps=1), Dashboard()]
        trainer = make_trainer(max_steps=steps, logger=logger, callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(TinyLM(), loader(), ckpt_path=last)
        logger.experiment.finish()
        trainer.save_checkpoint(last := tmp_path / f"{steps}.ckpt")
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    server = Server()
    with serving(server.answer) as server.address:
        settings = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *reversed(folders)],
            check=True,
            capture_output=True,
            timeout=120,
            env={**os.environ, **settings},
        )
    found = [server.rows[step] for step in sorted(server.rows)]
    assert [row["trainer/global_step"] for row in found if KEY in row] == list(range(7))
