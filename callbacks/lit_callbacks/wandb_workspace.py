"""The saved W&B workspace: which charts, in which sections."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_STEP = "trainer/global_step"


class Chart(NamedTuple):
    """A line plot over the optimizer steps.

    Args:
        title: What it shows.
        keys: Metric keys; or one regular expression, if it has a ``.*`` in it.
        log: Whether its y-axis is logarithmic.
    """

    title: str
    keys: tuple[str, ...]
    log: bool = False


class Pictures(NamedTuple):
    """The pictures of a key."""

    key: str


class Table(NamedTuple):
    """The last table of a key."""

    key: str


_LOSS = Chart("loss", ("train/loss", "val/loss", "train_loss", "val_loss"), log=True)
_GRADIENT = Chart("gradient norm, before and after clipping", ("grad_norm/total", "grad_norm/clipped"), log=True)
_ENTROPY = Chart("smallest attention entropy of a head", ("attention_entropy/min",))
_DEAD = Chart("share of dead units by layer", ("dead_neurons/(?!window_tokens).*",))
_SCORE = Chart("how far the loss is from normal", ("loss_spike/score",))
_DONE = Chart(
    "steps skipped, rollbacks, steps lost",
    tuple(f"loss_spike/{n}" for n in ("skipped_steps", "rollbacks", "steps_lost")),
)
_SPEED = Chart("tokens per second", ("throughput/tokens_per_second",))
_RATE = Chart("learning rate", ("lr.*",))

SECTIONS: dict[str, tuple[Chart | Pictures | Table, ...]] = {
    "Overview": (_LOSS, _GRADIENT, _ENTROPY, _DEAD, _SCORE, _DONE, _SPEED, _RATE),
    "Loss": (
        Chart("training", ("train.*",)),
        Chart("validation", ("val.*",)),
        _RATE,
    ),
    "Gradients": (
        _GRADIENT,
        Pictures("heat_maps/grad_norm"),
        Chart(
            "gradient norm by kind of parameter",
            ("grad_norm/(attention|feed_forward|norm|embedding|head).*",),
            log=True,
        ),
        Chart(
            "vanishing, exploding and non-finite",
            tuple(f"grad_norm/{n}" for n in ("vanishing", "exploding", "nonfinite")),
        ),
        Chart("step relative to the weights", ("update_ratio/.*",), log=True),
        Chart("norm of the weights", ("param_norm/.*",), log=True),
    ),
    "Attention": (
        _ENTROPY,
        Pictures("heat_maps/attention_entropy"),
        Chart("entropy by layer", ("attention_entropy/.*",)),
        Chart("largest logit by layer", ("attention_logit_max/.*",), log=True),
        Chart("attention to the first token by layer", ("attention_first/.*",)),
    ),
    "Neurons": (
        Pictures("heat_maps/dead_neurons"),
        _DEAD,
        Chart("share of dormant units by layer", ("dormant_neurons/.*",)),
        Chart("residual stream by layer, root mean square", ("residual/rms_.*",), log=True),
        Chart("residual stream by layer, largest element", ("residual/max_.*",), log=True),
    ),
    "Recovery": (
        Table("events/table"),
        _DONE,
        _SCORE,
        Chart("learning rate lowered by recovery to", ("loss_spike/lr_factor",)),
        Chart("steps that were not finite, new levels accepted", ("loss_spike/nonfinite", "loss_spike/accepted")),
    ),
    "Throughput": (
        _SPEED,
        Chart("seconds a step, median and 95th percentile", ("throughput/step_time_p50", "throughput/step_time_p95")),
        Chart("model FLOPs utilisation", ("throughput/mfu", "throughput/gemm_utilization")),
        Chart("GPU memory in GiB", ("throughput/gpu_memory_gib",)),
    ),
    "Data": (
        Chart("tokens so far", ("throughput/total_tokens",)),
        Chart("share of the time spent waiting for data", ("throughput/data_wait_share",)),
        Chart("tokens a step", ("throughput/effective_batch_tokens",)),
        Chart("length of the sequences", ("curriculum/sequence_length",)),
    ),
}
"""Charts by section, for the keys of the callbacks' catalogue."""


def workspace(entity: str, project: str, name: str = "Training stability") -> "Workspace":
    """A W&B workspace for runs that have the callbacks of this package; its ``save()`` sends it to W&B.

    The overview is open, with eight charts; the other sections are a click away. A key that a run does not have leaves
    its chart empty.

    Args:
        entity: User or team.
        project: The runs' project.
        name: What the workspace is called.

    Raises:
        ModuleNotFoundError: If ``wandb-workspaces`` is not installed.

    Example:
        >>> import pytest
        >>> _ = pytest.importorskip("wandb_workspaces")
        >>> [section.name for section in workspace("me", "mine").sections][:3]
        ['Overview', 'Loss', 'Gradients']
    """
    from wandb_workspaces import workspaces as ws

    layout = ws.SectionLayoutSettings(columns=4, rows=2)
    sections = [
        ws.Section(
            name=title,
            panels=[_panel(shown) for shown in panels],
            is_open=title == "Overview",
            layout_settings=layout,
            panel_settings=ws.SectionPanelSettings(x_axis=_STEP),
        )
        for title, panels in SECTIONS.items()
    ]
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, settings=ws.WorkspaceSettings(x_axis=_STEP)
    )


def _panel(shown: Chart | Pictures | Table) -> Any:
    from wandb_workspaces.reports.v2 import interface as wr

    if isinstance(shown, Pictures):
        return wr.MediaBrowser(title=shown.key, media_keys=[shown.key])
    if isinstance(shown, Table):
        return wr.WeavePanelSummaryTable(table_name=shown.key)
    lines = {"metric_regex": shown.keys[0]} if ".*" in shown.keys[0] else {"y": list(shown.keys)}
    return wr.LinePlot(title=shown.title, x=_STEP, log_y=shown.log, **lines)
