"""What a W&B run is told beside the metrics: which summary is right, tags, alerts, events, the verdict, checkpoints."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_callbacks._pictures import logger_kind

STEP = "trainer/global_step"
_COUNTERS = ("skipped_steps", "rollbacks", "steps_lost", "nonfinite", "accepted", "score")
_BEST = {
    **{f"{stage}{sign}loss": "min" for stage in ("train", "val") for sign in "/_"},
    **{f"loss_spike/{counter}": "max" for counter in _COUNTERS},
    "loss_spike/lr_factor": "min",
    "val/perplexity": "min",
    "val/accuracy": "max",
    "grad_norm/total": "max",
    "attention_entropy/min": "min",
}
"""What the summary of a key is; by default it is the last value. By name: W&B ignores a pattern's summary."""

_OF_PARTS = frozenset(
    (
        "grad_norm", "grad_nonfinite", "param_norm", "param_nonfinite", "update_ratio", "attention_entropy",
        "attention_entropy_p5", "attention_collapsed", "attention_logit_max", "attention_first", "dead_neurons",
        "dormant_neurons", "dormant_persistence", "weight_dead_neurons", "residual",
    )
)  # fmt: skip
"""Sections with a key for each layer, head or group of parameters."""
_OF_THE_WHOLE = frozenset(
    (
        *(f"grad_norm/{name}" for name in ("total", "clipped", "rms", "nonfinite", "vanishing", "exploding")),
        "grad_norm/threshold", "grad_norm/clip_coefficient", "param_norm/total", "update_ratio/total",
        "attention_entropy/min", "dead_neurons/window_tokens",
    )
)  # fmt: skip
"""The few others in these."""

_TITLES = {
    "skip": "Loss spike: steps are skipped",
    "rollback": "Weights rolled back",
    "accept": "New loss level accepted",
    "stop": "Run stopped",
    "shutdown": "Run stopped",
    "hang": "Run hangs",
    "save_failed": "Checkpoint not saved",
    "entropy_collapse": "Attention entropy collapse",
    "attention_uniform": "Attention stays uniform",
    "gradient_exploding": "Gradient explodes",
    "gradient_vanishing": "Gradient vanishes",
    "gradient_not_finite": "Gradient not finite",
}


def wandb_runs(trainer: Trainer) -> list[Any]:
    """The W&B runs of a trainer's loggers, less those that are switched off, or have not answered in time."""
    runs = [logger.experiment for logger in trainer.loggers if logger_kind(logger) == "WandbLogger"]  # type: ignore[attr-defined]
    return [run for run in runs if type(run).__name__ not in ("RunDisabled", "_DummyExperiment")]


def introduce(trainer: Trainer) -> None:
    """Say by tags how the run is made, and define what the summary of a key is."""
    strategy = getattr(trainer.strategy, "strategy_name", None) or type(trainer.strategy).__name__
    for run in wandb_runs(trainer):
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), str(strategy), str(trainer.precision)]))
        for key, best in {**_BEST, **_monitored(trainer)}.items():
            run.define_metric(key, step_metric=STEP, summary=best)


def _monitored(trainer: Trainer) -> dict[str, str]:
    """What callbacks look for the best of, and whether that is the min or max."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    modes = [(getattr(callback, "monitor", None), getattr(callback, "mode", None)) for callback in callbacks]
    return {key: str(mode) for key, mode in modes if isinstance(key, str) and mode in ("min", "max")}


def is_of_a_part(key: str) -> bool:
    """Whether a key is one of the many: of a layer, a head or a group of parameters.

    Example:
        >>> is_of_a_part("grad_norm/layer_0"), is_of_a_part("grad_norm/total"), is_of_a_part("val/loss")
        (True, False, False)
    """
    return key.partition("/")[0] in _OF_PARTS and key not in _OF_THE_WHOLE


def hide(trainer: Trainer, keys: Iterable[str]) -> None:
    """Keep W&B from drawing a chart of each that is not monitored. They stay in the run, for charts that are asked for.

    By name: of two patterns that match, such as Lightning's ``*``, W&B takes either.
    """
    monitored = _monitored(trainer)
    for run in wandb_runs(trainer):
        for key in keys:
            if key not in monitored:
                run.define_metric(key, step_metric=STEP, hidden=True)


class Alerts:
    """One alert of a kind in so many minutes: whoever is woken by the first does not need the second.

    Args:
        every_minutes: Least time between two of a kind.
    """

    def __init__(self, every_minutes: float) -> None:
        self.every_minutes = every_minutes
        self._last: dict[str, float] = {}

    def raise_for(self, trainer: Trainer, event: Mapping[str, Any]) -> None:
        """An alert, if the event is one to be told of."""
        kind = str(event.get("alarm") or event.get("event"))
        if kind in _TITLES:
            ((step, _, where, text),) = event_rows([event])
            self.send(trainer, _TITLES[kind], f"step {step}: {text or where}")

    def send(self, trainer: Trainer, title: str, text: str) -> None:
        """One of a title, unless there was one lately."""
        now = time.monotonic()
        if now - self._last.get(title, -float("inf")) < 60 * self.every_minutes:
            return
        self._last[title] = now
        for run in wandb_runs(trainer):
            run.alert(title=title, text=text, wait_duration=60 * self.every_minutes)


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Step, event, where and text of each, for a table.

    Example:
        >>> event_rows([{"step": 7, "event": "alarm", "alarm": "entropy_collapse", "where": ["a, head 0"]}])
        [[7, 'entropy_collapse', 'a, head 0', '']]
    """
    rows = []
    for event in events:
        where = event.get("where") or event.get("parameter") or ""
        shown = where if isinstance(where, str) else ", ".join(map(str, where))
        text = next((str(event[key]) for key in ("text", "message", "reason", "error") if event.get(key)), "")
        rows.append([event.get("step"), str(event.get("alarm") or event.get("event")), shown, text])
    return rows


def log_events(trainer: Trainer, step: int, events: Sequence[Mapping[str, Any]]) -> None:
    """All of them as one table, which replaces the last."""
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if logger_kind(logger) == "WandbLogger":
            logger.log_table("events/table", ["step", "event", "where", "text"], event_rows(events), step=step)


def keep_checkpoints(trainer: Trainer) -> None:
    """The last and the best checkpoint as versions of one artifact; without a network they wait in the run's folder."""
    import wandb

    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    aliases: dict[str, list[str]] = {}
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            best, last = (str(getattr(callback, f"{which}_model_path", "")) for which in ("best", "last"))
            # Without a monitor the "best" is the newest.
            found = {"best": best, "last": last} if getattr(callback, "monitor", None) else {"last": last or best}
            for alias, path in found.items():
                if path and Path(path).exists():
                    aliases.setdefault(path, []).append(alias)
    for run in wandb_runs(trainer):
        for path, names in aliases.items():
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": trainer.global_step})
            if Path(path).is_dir():
                artifact.add_dir(path)
            else:
                artifact.add_file(path, policy="immutable")  # not copied first
            run.log_artifact(artifact, aliases=names)
