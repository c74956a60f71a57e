"""The offline report: what is read, what is drawn, and what a browser makes of it."""

import csv
import dataclasses
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from browser import open_in_browser
from helpers import TinyLM, loader
from lit_callbacks import AttentionEntropyMonitor, GradientNormLogger, LossSpikeRecovery
from lit_callbacks.report import ReportError, as_json, page, read_run, write_report
from lit_callbacks.report.__main__ import main
from lit_callbacks.report._settings import flat, plain
from lit_callbacks.report.downsample import envelope, grid
from lit_callbacks.testing import Fault, FaultInjector


def write_metrics(folder, series, name="metrics.csv"):
    """As lit_transformer writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["step", "key", "value"],
                *([step, key, value] for key, points in series.items() for step, value in points),
            ]
        )


def write_events(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def losses(n=200, every=1, seed=0):
    generator = random.Random(seed)
    return [(i * every, 2 + 3 * math.exp(-8 * i / n) + generator.gauss(0, 0.05)) for i in range(n)]


def skip(step, **more):
    return {"step": step, "event": "skip", "rule": "loss", "loss": 9.0, "grad_norm": 2.0, **more}


@pytest.fixture
def diverged(tmp_path):
    """A run of 3 layers whose loss leaves at step 200, of which layer 1 is the first at step 180."""
    folder = tmp_path / "runs" / "diverged"
    layers = {
        f"grad_norm/layer_{i}": [(step, 60.0 if step >= since else 1.0 + 0.1 * (step % 3)) for step in range(0, 260, 5)]
        for i, since in enumerate([200, 180, 195])
    }
    write_metrics(folder, {"train/loss": [*losses(), *((200 + i, 7.0) for i in range(60))], **layers})
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"lr": 0.1}}))
    write_events(folder, [{"step": 190, "event": "alarm", "alarm": "gradient_exploding", "where": ["layer_1"]}])
    return folder


class Logs(TinyLM):
    """Logs its loss as most people do."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


def test_someone_whose_run_diverged_reads_layer_and_step_first(diverged, tmp_path):
    write_report([read_run(diverged)], tmp_path / "report.html")
    dom, _ = open_in_browser(tmp_path / "report.html", tmp_path, "found.text = document.body.innerText.slice(0, 600)")
    first = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"').replace("&amp;", "&"))["text"]
    assert "Diverging since step 200" in first
    assert "at step 180, in layer_1, the gradient norm was" in first
    assert "What to do: lower the learning rate" in first


def test_what_lay_ahead_of_a_resume_is_not_read(tmp_path):
    write_metrics(tmp_path, {"train/loss": losses()[:160]})
    lines = [(100, "skip"), (155, "stop"), (150, "resume"), (158, "skip")]
    write_events(tmp_path, [{"step": step, "event": event, "rule": "loss"} for step, event in lines])
    run = read_run(tmp_path)
    assert [(event["step"], event["event"]) for event in run.events] == [(100, "skip"), (150, "resume"), (158, "skip")]
    assert run.diagnosis().verdict == "recovered"


def test_the_fault_of_a_real_run_is_marked_where_it_was_injected(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version="a", flush_logs_every_n_steps=1)
    injector = FaultInjector([Fault("nan_loss", step=41)])
    watching = [GradientNormLogger(every_n_steps=5), AttentionEntropyMonitor(every_n_steps=5, per_head=True)]
    trainer = make_trainer(max_steps=60, logger=logger, callbacks=[*watching, LossSpikeRecovery(), injector])
    trainer.fit(Logs(), loader(n_samples=64))
    injector.assert_all_fired()

    run = read_run(tmp_path / "logs" / "a")
    assert run.diagnosis().verdict == "recovered"
    write_report([run], tmp_path / "report.html")
    point = (
        "const mark = document.querySelector('[data-kind=skip]'), svg = mark.closest('svg');"
        "const box = mark.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.x + box.width / 2, clientY: box.y - 40}));"
        "found.tip = svg.closest('figure').querySelector('.tip').textContent;"
        "found.step = mark.dataset.step; found.title = mark.querySelector('title').textContent;"
        "found.place = svg.viewBox.baseVal.width * (box.x + box.width / 2 - svg.getBoundingClientRect().x)"
        " / svg.getBoundingClientRect().width;"
        "found.ends = [svg.dataset.left, svg.dataset.right, svg.dataset.first, svg.dataset.last].map(Number);"
        "found.captions = [...document.querySelectorAll('figcaption')].map((caption) => caption.textContent)"
    )
    _, found = open_in_browser(tmp_path / "report.html", tmp_path, point)
    assert (found["errors"], found["refused"], found["requests"]) == ([], [], [])
    assert found["step"] == "41"
    left, right, first, last = found["ends"]
    assert found["place"] == pytest.approx(left + (41 - first) / (last - first) * (right - left), abs=2)
    assert re.search(r"train_loss: .* \(step (40|41|42)\)", found["tip"])
    assert found["title"].startswith("step 41: the loss was not a finite number; the step was not made; cost 1 step")
    assert "Attention entropy at the end, layer by head" in found["captions"]


def test_a_hugging_face_model_with_three_callbacks_has_a_report(make_trainer, tmp_path):
    hf = pytest.importorskip("transformers")

    class LitGPT2(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            config = hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2)
            self.model = hf.GPT2LMHeadModel(config)

        def training_step(self, batch, batch_idx):
            loss = self.model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    logger = CSVLogger(tmp_path, name="gpt2", flush_logs_every_n_steps=1)
    watching = [GradientNormLogger(every_n_steps=5), AttentionEntropyMonitor(every_n_steps=5), LossSpikeRecovery()]
    injector = FaultInjector([Fault("nan_gradient", step=33, where="model.transformer.h.1.mlp.c_fc.weight")])
    make_trainer(max_steps=48, logger=logger, callbacks=[*watching, injector]).fit(LitGPT2(), loader())
    run = read_run(tmp_path / "gpt2")
    found = run.diagnosis()
    assert (found.verdict, found.culprit, found.first_warning_step) == (
        "recovered", "model.transformer.h.1.mlp.c_fc.weight", 33,
    )  # fmt: skip
    text = page([run])
    assert 'data-step="33" data-kind="skip"' in text
    for layer in range(3):
        assert f"<title>layer_{layer}</title>" in text
        assert f"<title>model_transformer_h_{layer}_attn</title>" in text


def test_the_browser_would_tell(tmp_path):
    bad = '<img src="http://x.invalid/a.png"><script>nonsense(</script>'
    (tmp_path / "bad.html").write_text(f"<html><head></head><body>{bad}</body></html>")
    _, found = open_in_browser(tmp_path / "bad.html", tmp_path)
    assert found["errors"]
    assert found["requests"] == ["http://x.invalid/a.png"]


def test_nothing_from_a_file_is_taken_for_html(diverged, tmp_path):
    evil = '</script><script>found.errors.push("ran")</script><img src=x onerror=alert(1)>'
    (diverged / "config.yaml").write_text(yaml.safe_dump({"name": evil, evil: 1}))
    write_events(diverged, [skip(3, text=evil, parameter=evil), {"step": 4, "event": evil, "x": evil}])
    layers = {f"{section}/{evil}": [(1, 0.5)] for section in ("grad_norm", "attention_entropy", "lr")}
    write_metrics(diverged, {"train/loss": losses(), **layers})
    evil_run = diverged.rename(diverged.with_name("<img src=y onerror=alert(2)>"))
    write_report([read_run(evil_run)], tmp_path / "report.html")
    dom, found = open_in_browser(tmp_path / "report.html", tmp_path, "found.images = document.images.length")
    assert (found["errors"], found["images"], found["requests"], found["refused"]) == ([], 0, [], [])
    assert "onerror=alert(2)&gt;" in dom


def test_secrets_stay_out(diverged, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    settings = {"logger": {"api_key": "sk-secret-1"}, "note": "key is 0123456789abcdef", "url": "s3://u:pw123@host/x"}
    settings |= {"tokenizer": {"pad_token": "<pad>"}, "hf_token": "hf_secret_2", "token_dropout": 0.3}
    (diverged / "config.yaml").write_text(yaml.safe_dump(settings))
    bad = {"step": 1, "event": "alarm", "alarm": "new", "where": ["0123456789abcdef"]}
    write_events(diverged, [bad, {"step": 1, "event": "save_failed", "error": "0123456789abcdef is no key"}])
    run = read_run(diverged)
    for text in (page([run]), as_json([run])):
        assert not [secret for secret in ("0123456789abcdef", "sk-secret-1", "pw123", "hf_secret_2") if secret in text]
        assert "pad" in text
        assert "0.3" in text


def test_two_runs_are_overlaid_and_their_difference_is_told(diverged, tmp_path):
    other = tmp_path / "runs" / "other"
    write_metrics(other, {"train/loss": losses(seed=1), "val/loss": [(100, 2.1)], "grad_norm/layer_0": [(0, 1.0)]})
    (other / "config.yaml").write_text(yaml.safe_dump({"model": {"lr": 0.001}}))
    write_events(other, [skip(50)])
    write_report([read_run(diverged), read_run(other)], tmp_path / "both.html")
    asked = (
        "found.lines = [...document.querySelector('figure.lines').querySelectorAll('path.line[d^=M]')].length;"
        "found.verdicts = document.querySelectorAll('section.verdict').length;"
        "found.differs = document.body.innerText.includes('What differs:')"
    )
    dom, found = open_in_browser(tmp_path / "both.html", tmp_path, asked)
    assert found["errors"] == []
    assert found["verdicts"] == 2
    assert found["lines"] >= 3
    assert found["differs"]
    assert "have measured different layers" in dom
    assert "diverged: train/loss" in dom


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        write_metrics(tmp_path / parent / "version_0", {"train/loss": losses()})
    write_metrics(tmp_path / "a" / "c", {"train/loss": losses()})
    write_metrics(tmp_path / "b" / "c", {"train/loss": losses()})
    assert [read_run(tmp_path / parent / "version_0").name for parent in "ab"] == ["a/version_0", "b/version_0"]
    text = page([read_run(tmp_path / parent / "c") for parent in "ab"])
    assert f"{tmp_path / 'a' / 'c'}: train/loss" in text


def test_a_rate_that_recovery_lowered_is_not_the_planned_one(tmp_path):
    rates = {"lr-AdamW": [(step, 1e-3) for step in range(50)], "loss_spike/lr_factor": [(0, 1.0), (30, 0.5)]}
    write_metrics(tmp_path / "run", {"train/loss": losses(50), **rates})
    texts = re.findall(r'<script type="application/json">(.*?)</script>', page([read_run(tmp_path / "run")]))
    lines = {line["name"]: line["y"] for text in texts for line in json.loads(text) if "name" in line}
    assert lines["lr-AdamW, actual"] == [1e-3] * 30 + [5e-4] * 20
    assert lines["planned"] == [1e-3] * 50


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_any_number_of_events(tmp_path, n):
    write_metrics(tmp_path / "run", {"train/loss": losses(2000)})
    write_events(tmp_path / "run", [skip(2 * i, sample_ids=[i, i + 1]) for i in range(n)])
    text = page([read_run(tmp_path / "run")])
    marks = re.findall(r'data-step="(\d+)" data-kind="skip" data-count="(\d+)"', text)
    assert sum(int(count) for _, count in marks) == n
    assert len(marks) <= 260, "those on top of each other are one"
    assert text.count("<tr id=") == min(n, 300)
    assert ("700 more are in events.jsonl" in text) == (n == 1000)


def test_a_spike_survives_thinning():
    points = [(step, 50.0 if step == 77_777 else 2.0) for step in range(100_000)]
    found = envelope(points, 600)
    assert len(found.steps) == 600
    assert max(found.high) == 50.0
    at = found.high.index(50.0)
    assert found.steps[at] <= 77_777 < found.steps[at] + 200
    table = grid({"a": points, "b": [(0, 1.0), (10, math.nan)]}, 160, "max")
    assert max(table.cells[0]) == 50.0
    assert table.edges[table.cells[0].index(50.0)] <= 77_777 < table.edges[table.cells[0].index(50.0) + 1]
    assert math.isinf(table.cells[1][0])
    assert math.isnan(table.cells[1][-1])


def test_lightnings_table_and_ours_say_the_same(tmp_path):
    logger = CSVLogger(tmp_path, name="wide", version=0)
    for step in range(20):
        logger.log_metrics({"train_loss": 3.0 - step / 10, **({"val_loss": 2.5} if step == 9 else {})}, step)
    logger.save()
    write_metrics(tmp_path / "long", {"train_loss": [(s, 3.0 - s / 10) for s in range(20)], "val_loss": [(9, 2.5)]})
    wide, long = read_run(tmp_path / "wide"), read_run(tmp_path / "long")
    assert wide.series == long.series
    assert wide.name == "wide/version_0"


def test_tensorboard_files_are_read(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, name="board", version=0)
    for step in range(20):
        logger.log_metrics({"train_loss": 3.0 - step / 10}, step)
    logger.finalize("success")
    logger.experiment.close()
    assert read_run(tmp_path / "board").series["train_loss"][-1] == (19, pytest.approx(1.1))


def test_a_file_that_is_being_written_is_read_up_to_its_torn_end(diverged):
    with (diverged / "metrics.csv").open("a") as file:
        file.write("260,train/loss,7.0\n261,train/lo")
    with (diverged / "events.jsonl").open("a") as file:
        file.write('{"step": 261, "event": "sk')
    (diverged / "heartbeat.json").write_text(json.dumps({"step": 261, "time": time.time()}))
    (diverged / "checkpoints").mkdir()
    (diverged / "checkpoints" / "step=5.ckpt.manifest.json").write_text('{"step": 5')
    run = read_run(diverged)
    assert run.series["train/loss"][-1] == (260, 7.0)
    assert [event["step"] for event in run.events] == [190]
    assert "under way, at step 261" in run.state
    assert any("events.jsonl is damaged: 1" in note for note in run.notes)
    assert "under way" in page([run])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "There are no numbers"),
        (b"step,key,value\n", "There are no numbers"),
        (b"step,key,value\n1,train/loss,2.0\n2,train/loss,x\n3\n\0\0\0\n", "3 of its lines could not be read"),
        (b"epoch,step,train_loss\n0,1,2.0\n0,2\n0,3,1.0\n", "1 of its lines could not be read"),
        (b'step,key,value\n1,"train/loss,2.0\n2,train/loss,3.0\n', "1 of its lines could not be read"),
        (b'epoch,step,train_loss\n0,"1,2.0\n0,2,3.0\n', "1 of its lines could not be read"),
        (b"step,key,value\ninf,train/loss,2.0\n1e300,train/loss,2.0\n", "2 of its lines could not be read"),
        (b"epoch,step,train_loss\n0,inf,2.0\n", "1 of its lines could not be read"),
        (b'step,key,value\n1,"' + b"x" * 200_000 + b'",2.0\n', "1 of its lines could not be read"),
        (b"\x89PNG\r\n\x1a\n\0\0", "metrics.csv could not be read"),
        (b"a,b\n1,2\n", "have a column called step"),
    ],
)
def test_damaged_numbers_are_a_note_on_the_page(tmp_path, content, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_bytes(content)
    run = read_run(tmp_path / "run")
    assert any(said in note for note in run.notes), run.notes
    assert said in page([run])
    json.loads(as_json([run]))


def test_a_stray_quote_costs_its_own_line_only(tmp_path):
    for header, line in (("step,key,value", "{},train_loss,{}"), ("epoch,step,train_loss", "0,{},{}")):
        rows = [line.format(step, step / 2) for step in range(9)]
        (tmp_path / "metrics.csv").write_text("\n".join([header, *rows[:3], f'"{rows[3]}', *rows[4:], ""]))
        run = read_run(tmp_path)
        assert run.series["train_loss"] == [(step, step / 2) for step in range(9) if step != 3]


def test_what_text_files_cannot_hold_does_not_stop_the_report(tmp_path):
    folder = tmp_path / "a$b_{$"
    write_metrics(folder, {"train/loss": losses(), "grad_norm/$x": losses(), "grad_norm/y": losses()})
    (folder / "events.jsonl").write_text(
        '{"step": 5, "event": "alarm", "alarm": "new", "where": ["a\\ud800"], "cost": NaN}\n'
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "a.manifest.json").write_text('{"step": 5, "score": NaN, "suspect": "s3://tok@host"}')
    run = read_run(folder)
    assert [checkpoint["name"] for checkpoint in run.checkpoints] == ["a"]
    for name in ("report.html", "report.json", "report.png"):
        write_report([run], tmp_path / name)
    assert "tok@" not in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["checkpoints"][0]["score"] == "nan"


def test_without_matplotlib_a_picture_is_refused_with_what_to_do(diverged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportError, match=r"needs matplotlib.*take \.html"):
        write_report([read_run(diverged)], tmp_path / "report.png")


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("userPassword", "passphrase", "db_pass", "private_key_pem", "access_key_id")),
        *((name, True) for name in ("tokens", "a.apiKey", "accessKeyId", "hf_tokens", "credentials.user", "token")),
        *((name, False) for name in ("pad_token", "max_tokens", "key_size", "n_kv_heads", "bypass", "token_dropout")),
    ],
)
def test_a_secret_is_known_by_its_name(name, secret):
    ((_, shown),) = flat(["x"], name)
    assert shown == ("<redacted>" if secret else "['x']")


@pytest.mark.parametrize("login", ["ghp_x", "user:p@ss", "user:pass", ":pass"])
def test_logins_of_addresses_are_left_out(login):
    assert plain({"a": [f"see https://{login}@host/x@y"]}) == {"a": ["see https://<redacted>@host/x@y"]}


def test_a_plan_reaches_as_far_as_its_run(tmp_path):
    write_metrics(tmp_path, {"lr": [(step, 0.1) for step in range(10)]})
    run = dataclasses.replace(read_run(tmp_path), planned=[(step, 0.1) for step in range(0, 1000, 3)])
    text = page([run])
    assert 'data-last="9"' in text
    assert not re.search(r'data-last="(?!9")', text)


def test_events_alone_are_a_page(tmp_path):
    write_events(tmp_path / "run", [skip(5)])
    text = page([read_run(tmp_path / "run")])
    assert "Loss, and what happened: not logged" in text
    assert "There are no numbers" in text


def test_missing_values_name_who_would_have_logged_them(tmp_path):
    write_metrics(tmp_path / "run", {"train/loss": losses()})
    text = page([read_run(tmp_path / "run")])
    for callback in ("AttentionEntropyMonitor", "GradientNormLogger", "DeadNeuronDetector", "ThroughputLogger"):
        assert f"<code>{callback}</code> logs it" in text


def test_settings_that_are_no_plain_yaml_are_shown_line_by_line(tmp_path):
    write_metrics(tmp_path / "run", {"train/loss": losses()})
    (tmp_path / "run" / "hparams.yaml").write_text("lr: 0.1\nmodel: !!python/object:x.Y\n  api_key: abc\n")
    settings = read_run(tmp_path / "run").settings
    assert settings["lr"] == "0.1"
    assert settings["api_key"] == "<redacted>"


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path, capsys):
    with pytest.raises(ReportError, match=r"there is no .*nope"):
        read_run(tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"expected a run's folder with metrics.csv.*give the folder"):
        read_run(tmp_path / "empty")
    for name in ("one", "two"):
        write_metrics(tmp_path / "many" / name, {"train/loss": losses()})
    with pytest.raises(ReportError, match=r"give one of the runs in it, such as .*one, .*two"):
        read_run(tmp_path / "many")
    assert main([str(tmp_path / "nope")]) == 2
    assert "error: expected a run's folder" in capsys.readouterr().err


def test_the_command_writes_page_picture_and_facts(diverged, tmp_path, capsys):
    wanted = [tmp_path / "out" / f"r.{suffix}" for suffix in ("html", "png", "json")]
    assert main([str(diverged), "--to", *map(str, wanted)]) == 0
    assert "Diverging since step 200" in capsys.readouterr().out
    facts = json.loads(wanted[2].read_text())["runs"][0]
    assert (facts["verdict"], facts["culprit"], facts["first_warning_step"]) == ("diverging", "layer_1", 180)
    assert facts["events"][0]["text"].startswith("step 190: the gradient norm was far above its usual value")
    assert wanted[1].read_bytes().startswith(b"\x89PNG")
    assert main([str(diverged)]) == 0
    assert (diverged / "report.html").is_file()
    assert main([str(diverged), "--to", str(tmp_path / "r.gif")]) == 2
    (tmp_path / "file").touch()
    assert main([str(diverged), "--to", str(tmp_path / "file" / "r.html")]) == 2


def test_several_are_compared_beside_the_first_whose_own_page_stays(diverged, tmp_path, capsys, monkeypatch):
    write_metrics(tmp_path / "other", {"train/loss": losses()})
    assert main([str(diverged)]) == 0
    own = (diverged / "report.html").read_text()
    assert main([str(diverged), str(tmp_path / "other")]) == 0
    compared = diverged.parent / "compared.html"
    assert f"Report: {compared}" in capsys.readouterr().out
    assert "other" in compared.read_text()
    assert (diverged / "report.html").read_text() == own
    compared.unlink()
    monkeypatch.chdir(diverged)
    assert main([".", str(tmp_path / "other")]) == 0
    assert compared.is_file()


def test_a_run_whose_heartbeat_says_that_it_ended_is_not_under_way(diverged):
    beat = {"step": 200, "time": time.time(), "stage": "train"}
    (diverged / "heartbeat.json").write_text(json.dumps(beat))
    assert "under way, at step 200" in read_run(diverged).state
    (diverged / "heartbeat.json").write_text(json.dumps(beat | {"stage": "end"}))
    assert read_run(diverged).state == "Its training has come to its end, at step 200."


@pytest.mark.parametrize("file", ["run-abc.wandb", "wandb/offline-run-1/run-abc.wandb", "wandb/latest"])
def test_of_a_folder_that_wandb_alone_wrote_to_it_is_said_what_is_missing(tmp_path, file):
    (tmp_path / "ID" / file).parent.mkdir(parents=True)
    (tmp_path / "ID" / file).touch()
    with pytest.raises(ReportError, match=r"W&B's own file alone.*logger=\[CSVLogger\(...\), WandbLogger\(...\)\]"):
        read_run(tmp_path / "ID")


@pytest.mark.parametrize("seed", range(25))
def test_whatever_is_in_the_files_there_is_a_page(tmp_path, seed):
    draw = random.Random(seed)
    junk = [None, 1, -5, 2.5, math.nan, math.inf, "x", [], [1, None], {}, {"a": 1}, True, 10**30, -1e300, "nan"]
    kinds = [
        "skip",
        "rollback",
        "accept",
        "stop",
        "alarm",
        "autopsy",
        "recipe",
        "jump",
        "shutdown",
        "hang",
        None,
        3,
        "",
    ]
    fields = [
        "rule",
        "loss",
        "grad_norm",
        "where",
        "parameter",
        "to_step",
        "in_a_row",
        "sample_ids",
        "passed_over",
        "alarm",
    ]
    keys = ["train/loss", "lr/a", "grad_norm/layer_0", "attention_entropy/a", "attention_entropy/a_head_0", "epoch"]
    keys += [
        "attention_logit_max/a",
        "residual/kurtosis_a",
        "dead_neurons/a",
        "loss_spike/lr_factor",
        "grad_norm/total",
    ]
    steps, values = [0, 1, 5, 900, -3, 10**12], ["nan", "inf", "1e300", "0", "-1e-300", "5", "0.1"]
    series = {key: [(draw.choice(steps), draw.choice(values)) for _ in range(draw.choice([0, 1, 60]))] for key in keys}
    write_metrics(tmp_path, series)
    events = [
        {"step": draw.choice(steps), "event": draw.choice(kinds), **{name: draw.choice(junk) for name in fields}}
        for _ in range(30)
    ]
    write_events(tmp_path, events)
    run = read_run(tmp_path)
    text = page([run])
    places = re.findall(r' (?:d|x|y|cx|cy|x1|x2|y1|y2|transform)="([^"]*)"', text)
    assert not [place for place in places if "nan" in place or "inf" in place]
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text):
        json.loads(data, parse_constant=pytest.fail)
    json.loads(as_json([run]), parse_constant=pytest.fail)


def test_the_gallery_shows_what_its_script_makes():
    root = Path(__file__).parents[2]
    names = re.findall(r'^    "(\w+)": \(', (root / "benchmarks" / "gallery.py").read_text(), re.MULTILINE)
    pictures = sorted((root / "docs" / "gallery").glob("*.png"))
    assert sorted(names) == [picture.stem for picture in pictures]
    assert re.findall(r"\(gallery/(\w+)\.png\)", (root / "docs" / "gallery.md").read_text()) == names
    assert all(picture.stat().st_size <= 150_000 for picture in pictures)


def test_not_finite_values_are_crosses_and_their_own_cells(tmp_path):
    series = {"train/loss": [*losses(50), (50, math.nan)], "grad_norm/layer_0": [(0, 1.0), (25, math.inf), (50, 1.0)]}
    write_metrics(tmp_path / "run", series)
    text = page([read_run(tmp_path / "run")])
    assert 'class="lost"' in text
    assert '<path class="nf"' in text
    json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert main([str(tmp_path / "run"), "--to", str(tmp_path / "r.png")]) == 0
