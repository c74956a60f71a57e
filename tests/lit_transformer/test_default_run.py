"""The README's run, whole."""

from pathlib import Path

import pytest

from lit_transformer.cli import main
from lit_transformer.run.metrics_file import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize("config", ["default", "post_ln"])
def test_a_shipped_run_learns_real_text(config, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", config, "--run", "a"])
    assert read_metrics(Path("runs/a/metrics.csv"))["val/loss"][-1][1] <= 1.6
    capsys.readouterr()
    main(["generate", "--run", "a", "--prompt", "def ", "--max_new_tokens", "1500"])
    text = capsys.readouterr().out
    assert "self" in text
    assert "\n    " in text
