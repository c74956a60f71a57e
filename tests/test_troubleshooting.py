"""What the troubleshooting page names exists."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
import yaml

import lit_callbacks
from lit_callbacks.recipe import IDS
from lit_transformer.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
CODE = re.findall(r"`([^`]+)`", PAGE)
KEYS = sorted({c for c in CODE if re.fullmatch(r"[a-z_]+/[A-Za-z0-9_<>]+", c)})
SETTINGS = sorted({c for c in CODE if re.fullmatch(r"(model|data|trainer)\.[a-z_.]+", c)})


def test_the_keys_are_logged_by_somebody():
    documented = "\n".join(inspect.getdoc(getattr(lit_callbacks, name)) or "" for name in lit_callbacks.__all__)
    own = {"val/loss", "train/loss", "lr/<group>"}
    assert [key for key in KEYS if f"{key}: " not in documented and key not in own] == []
    assert len(KEYS) > 10


@pytest.fixture(scope="module")
def printed():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    return out.getvalue()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_settings_exist(printed, setting):
    value = yaml.safe_load(printed)
    for part in setting.split("."):
        assert part in value, setting
        value = value[part]


def test_the_findings_exist():
    assert {"not-learning", "generalization-gap"} <= set(IDS) & set(CODE)
