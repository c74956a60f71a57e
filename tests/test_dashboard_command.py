"""The saved W&B workspace: as the object that would be sent, and as it comes to a server that stands for W&B's."""

import json
import os
import re
import subprocess
import sys

import pytest

import lit_callbacks
from lit_callbacks.wandb_workspace import SECTIONS, Chart, Pictures
from lit_transformer.cli import main
from wandb_double import VIEWER, serving


@pytest.fixture
def model():
    pytest.importorskip("wandb_workspaces")
    return lit_callbacks.workspace("me", "mine")._to_model().model_dump(by_alias=True, exclude_none=True)


def sections(model):
    return model["spec"]["section"]["panelBankConfig"]["sections"]


def test_the_overview_is_open_with_eight_charts_and_the_rest_is_a_click_away(model):
    found = sections(model)
    names = ["Overview", "Loss", "Gradients", "Attention", "Neurons", "Recovery", "Throughput", "Data"]
    assert [section["name"] for section in found] == names
    assert len(found[0]["panels"]) == 8
    assert [section["isOpen"] for section in found] == [True, *[False] * 7]


def test_every_line_is_over_the_optimizer_steps(model):
    lines = [p["config"] for s in sections(model) for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
    assert len(lines) > 25
    assert {line["xAxis"] for line in lines} == {"trainer/global_step"}
    assert all(line["metrics"] or line["metricRegex"] for line in lines)


def test_the_charts_are_of_keys_in_the_catalogue():
    documented = {"train/loss", "val/loss", "train_loss", "val_loss", "lr/decay"}
    for name in lit_callbacks.__all__:
        text = getattr(lit_callbacks, name).__doc__ or ""
        documented |= {re.sub(r"<\w+>", "layer_0", key) for key in re.findall(r"^ +(\w+/\S+): ", text, re.MULTILINE)}
    documented |= {
        "grad_norm/attention_in",
        "heat_maps/grad_norm",
        "heat_maps/attention_entropy",
        "heat_maps/dead_neurons",
    }
    assert len(documented) > 40
    for charts in SECTIONS.values():
        for chart in charts:
            for key in chart.keys if isinstance(chart, Chart) else ():
                pattern = key if ".*" in key else re.escape(key)
                assert any(re.fullmatch(pattern, known) for known in documented), key
            if isinstance(chart, Pictures):
                assert chart.key in documented


@pytest.mark.parametrize(
    ("words", "hidden", "message"),
    [
        ([], None, "dashboard needs the W&B user or team that it is for: --entity NAME"),
        (
            ["--entity", "me"],
            None,
            "a workspace is kept in W&B, which cannot be asked: there is no API key; wandb login",
        ),
        (
            ["--entity", "me"],
            "wandb_workspaces",
            "is not installed (extra dashboard): pip install wandb-workspaces",
        ),
        (["--entitty", "me"], None, "entity"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(words, hidden, message, monkeypatch, capsys, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if hidden:
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(SystemExit) as stopped:
        main(["dashboard", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_it_says_where_the_workspace_is(monkeypatch, capsys):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    monkeypatch.setattr("lit_transformer.commands.dashboard.why_offline", lambda: None)
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: self)
    monkeypatch.setattr(workspaces.Workspace, "url", "https://example.org/me/mine?nw=1")
    main(["dashboard", "--entity", "me", "--project", "mine"])
    assert capsys.readouterr().out == (
        "Workspace 'Training stability' with 8 sections: https://example.org/me/mine?nw=1\n"
    )


def test_what_the_server_says_against_it_is_passed_on(monkeypatch, capsys):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")

    def refuse(self):
        raise ValueError("entity me not found")

    monkeypatch.setattr("lit_transformer.commands.dashboard.why_offline", lambda: None)
    monkeypatch.setattr(workspaces.Workspace, "save", refuse)
    with pytest.raises(SystemExit):
        main(["dashboard", "--entity", "me"])
    assert "W&B did not take the workspace: entity me not found" in capsys.readouterr().err


@pytest.fixture
def server():
    """The address of what stands for W&B's server, and the workspaces that it was sent."""
    saved = []

    def answer(name, request):
        if "upsertView" not in request["query"]:
            return VIEWER
        saved.append(request)
        return {"upsertView": {"view": {"id": "2", "name": "nw-abc-v"}, "inserted": True}}

    with serving(answer) as address:
        yield address, saved


def test_the_workspace_comes_to_the_server_whole(model, server, tmp_path):
    address, saved = server
    words = ["--entity", "me", "--project", "mine"]
    done = subprocess.run(
        [sys.executable, "-c", "from lit_transformer.cli import main; main()", "dashboard", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Workspace 'Training stability' with 8 sections: {address}/me/mine?nw=abc")
    (request,) = saved
    assert re.search(r"mutation \w+\(.*\$spec: String.*\) *{\s*upsertView\(", request["query"])
    sent = request["variables"]
    assert (sent["entityName"], sent["projectName"], sent["type"]) == ("me", "mine", "project-view")
    assert sent["displayName"] == "Training stability"
    assert "id" not in sent, "a new one"
    banks = [json.loads(sent["spec"]), model["spec"]]
    arrived, made = ([[p["config"] for p in s["panels"]] for s in sections({"spec": bank})] for bank in banks)
    assert arrived == made
