"""``cli.py report``: after a real fit with a fault, from the run's folder alone."""

import json
from pathlib import Path

import pytest
import yaml

from lit_transformer import WarmupCosine
from lit_transformer.commands.report import planned


def test_a_run_with_a_fault_is_reported_on(cli):
    faults = [
        "--trainer.callbacks+=lit_callbacks.testing.FaultInjector",
        "--trainer.callbacks.faults=[{kind: nan_loss, step: 11}]",
    ]
    code, _, error = cli("fit", "--config", "config.yaml", "--run", "mine", "--trainer.max_steps=120", *faults)
    assert code == 0, error
    code, out, _ = cli("report")
    assert code == 0
    assert "Report: runs/mine/report.html" in out
    assert "Recovered once" in out
    assert "1 skipped step, in 1 episode; it cost 1 step." in out
    text = Path("runs/mine/report.html").read_text()
    assert 'data-step="11" data-kind="skip"' in text
    assert "planned" in text
    assert "step=120.ckpt" in text
    assert "optimizer.init_args.lr" in text

    code, out, _ = cli("report", "mine", "runs/mine")
    assert code == 0
    assert "Report: runs/compared.html" in out
    assert Path("runs/mine/report.html").read_text() == text
    code, out, _ = cli("report", "mine", "runs/mine", "--to", "both.html", "both.json")
    assert code == 0
    assert [run["verdict"] for run in json.loads(Path("both.json").read_text())["runs"]] == ["recovered"] * 2


def test_what_cannot_be_reported_on_is_one_paragraph(cli):
    assert cli("report") == (2, "", "\nerror: there are no runs under runs; name one, or give --root FOLDER\n")
    code, _, error = cli("report", "--run", "nope")
    assert code == 2
    assert "there is no runs/nope; give the folder that has its metrics.csv" in error
    code, _, error = cli("report", "--nope", "1")
    assert code == 2
    assert "nope" in error


def test_the_plan_is_the_schedule_of_the_configuration(tmp_path):
    schedule = WarmupCosine(warmup=100, min_lr_ratio=0.1)
    points = dict(planned(schedule, 2e-3, 10_000, last=9_999))
    assert points[99] == pytest.approx(2e-3)
    assert points[9_999] == pytest.approx(2e-4, rel=1e-3)
    assert len(points) <= 503
    begun = dict(planned(schedule, 2e-3, 100_000, last=1_000))
    assert max(begun) == 1_000, "a run that has begun is not squeezed into a corner by its plan"
    assert len(begun) > 400


@pytest.mark.parametrize(
    "schedule", ["os.system", "lit_transformer.LitCausalLM", "lit_transformer.WarmupCosine", None, 3]
)
def test_a_configuration_from_elsewhere_is_not_run(cli, schedule):
    folder = Path("runs/foreign")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,key,value\n1,train/loss,2.0\n")
    spec = {"class_path": schedule, "init_args": {"command": "touch ran"}}
    arguments = {"schedule": spec, "optimizer": {"init_args": {"lr": 0.1}}}
    config = {"model": {"init_args": arguments}, "trainer": {"max_steps": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli("report", "foreign")[0] == 0
    assert not Path("ran").exists()
    assert '"planned"' not in (folder / "report.html").read_text()
