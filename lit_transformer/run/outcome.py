"""How a run has ended, in one table: the verdict, the numbers, and what to type next."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lit_transformer.run.folder import RunFolder
from lit_transformer.run.report import command_for, program_name

_WIDTH = 100
_BAD = ("at risk", "not learning", "diverging", "stopped")
_LOSSES = {"train/loss": "{:.4f} in training", "val/loss": "{:.4f} in validation"}
_DONE = {
    "loss_spike/skipped_steps": "{:.0f} skipped",
    "loss_spike/rollbacks": "{:.0f} rolled back",
    "loss_spike/steps_lost": "{:.0f} lost by that",
}


def outcome_table(verdict: Sequence[str], metrics: Mapping[str, Tensor], step: int, command: str) -> str:
    """A row for each thing that can be said.

    Args:
        verdict: Its sentences; empty where there is none.
        metrics: By key; those that are missing are left out.
        step: Optimizer steps made.
        command: What to type next; empty where there is nothing.

    Example:
        >>> import torch
        >>> metrics = {"train/loss": torch.tensor(2.5), "loss_spike/skipped_steps": torch.tensor(3.0)}
        >>> print(outcome_table(["Recovered.", "Three steps were skipped."], metrics, 20, "python cli.py test"))
        verdict   Recovered.
                  Three steps were skipped.
        loss      2.5000 in training
        steps     20, 3 skipped
        next      python cli.py test
    """

    def shown(texts: Mapping[str, str]) -> list[str]:
        return [text.format(float(metrics[key])) for key, text in texts.items() if key in metrics]

    rows = {
        "verdict": "\n".join(line for sentence in verdict for line in textwrap.wrap(sentence, _WIDTH)),
        "loss": ", ".join(shown(_LOSSES)),
        "steps": ", ".join([f"{step:,}", *shown(_DONE)]),
        "next": command,
    }
    return "\n".join(f"{name:<10}" + text.replace("\n", f"\n{'':10}") for name, text in rows.items() if text)


def next_command(run: RunFolder, root: Path, verdict: str) -> str:
    """What to type after a run: test what is good and was saved, as one file; look into what is not."""
    saved = [(name, path) for name in ("best", "last") for path in run.checkpoints.glob(f"{name}*.ckpt")]
    if not saved or verdict in _BAD:
        return _with_root("report", run, root)
    name, path = saved[0]
    if path.is_dir():  # it is in parts
        return _with_root("consolidate", run, root, "--ckpt_path", name, "--to", f"{run.path.name}.ckpt")
    return command_for("test", run, root, name)


def go_on_command(run: RunFolder, root: Path, diverged: bool) -> str:
    """What to type after a run that was stopped or failed: go on with it; look into one that has saved nothing."""
    if diverged and run.last_good.is_file():
        return command_for("fit", run, root, str(run.last_good))
    saved = any(run.checkpoints.glob("*.ckpt"))
    return command_for("fit", run, root, "last") if saved else _with_root("report", run, root)


def _with_root(command: str, run: RunFolder, root: Path, *words: str) -> str:
    folder = [] if root == Path("runs") else ["--root", str(root)]
    return f"{program_name()} {shlex.join([command, '--run', run.path.name, *folder, *words])}"
