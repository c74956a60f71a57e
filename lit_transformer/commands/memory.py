"""``memory``: what does a device hold, under which strategy does it fit?"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lit_callbacks import LossSpikeRecovery
from lit_transformer.commands.training import TrainingCLI, quieten
from lit_transformer.errors import UsageError
from lit_transformer.nn.attention import CrossAttention, SelfAttention
from lit_transformer.nn.stack import Stack
from lit_transformer.nn.summary import activation_storages, kept_storages
from lit_transformer.recipe import LitRecipe
from lit_transformer.strategies.memory import Load, Use, held_by, optimizer_states, uses
from lit_transformer.tasks.pretrained import LitPretrained

_DEVICES = 8
_COLUMNS = ("parameters", "gradients", "states", "activations", "exchange", "total", "host", "snapshots")
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def main(words: list[str]) -> None:
    """Print a line for each strategy, and what the numbers are.

    Raises:
        UsageError: For anything wrong in the words or the configuration, and for data whose batches have no known size.
    """
    cli = MemoryCLI(words)
    settings = cli.settings
    devices, why = _devices(settings)
    if settings.tensor_parallel < 1 or devices % settings.tensor_parallel:
        raise UsageError(
            f"tensor_parallel must be a divisor of the number of devices, which is {devices}, got "
            f"{settings.tensor_parallel}"
        )
    if settings.gib is not None and settings.gib <= 0:
        raise UsageError(f"gib must be above 0, got {settings.gib:g}")
    load, batch = cli.load()
    found = uses(load, devices, settings.tensor_parallel)
    numbers = f"{load.numbers:,} parameters, precision {settings.trainer.precision} ({cli.precision_reason})"
    print(f"{type(cli.model).__name__}, {numbers}, {batch}; {devices} devices, {why}.")
    print("\n".join(table(found)))
    print(_legend(load))
    if settings.gib is not None:
        print(_first_to_fit(found, settings.gib))


class MemoryCLI(TrainingCLI):
    """Model and data from the words of ``fit``; parameters have shapes, and no memory."""

    def __init__(self, words: list[str]) -> None:
        quieten()
        super().__init__(["fit", *words])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of fit, and three more."""
        super().add_arguments_to_parser(parser)
        text = f"How many; by default those of the configuration, or {_DEVICES} where that has no number above 1."
        parser.add_argument("--devices", type=int | None, default=None, help=text)
        text = "How many of them compute each block together, for a line on tensor parallelism."
        parser.add_argument("--tensor_parallel", type=int, default=1, help=text)
        parser.add_argument("--gib", type=float | None, default=None, help="Memory of a device: what fits first?")

    def instantiate_classes(self) -> None:
        """On the meta device; a folder or name of Hugging Face's is read for its configuration alone."""
        options = self.settings.model.get("init_args", {})
        if options.get("path") is not None and "architecture" in options:
            from lit_transformer.hugging_face import architecture_of

            options.architecture, options.path = architecture_of(options.path), None
        with torch.device("meta"):
            super().instantiate_classes()

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """One that is not used: the configured one may be for devices that are not here."""
        with torch.device("cpu"):
            return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: the command decides."""

    def load(self) -> tuple[Load, str]:
        """What there is to hold, and a phrase about the batch."""
        module: Any = self.model
        assert isinstance(module, LitRecipe)
        module.param_groups.freeze(module)
        precision = str(self.settings.trainer.precision)
        if precision in _DTYPES:
            module.to(_DTYPES[precision])
        try:
            states = optimizer_states(module.optimizer_factory, module.groups_to_train())
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"the optimizer cannot take a step on small parameters: {error}") from error
        if self.settings.trainer.accelerator != "cpu":
            _attend_as_on_a_gpu(module)
        batch, target, source = batch_shape(self.datamodule)
        is_mixed = precision.endswith("mixed")
        with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
            storages = activations(module, batch, target, source)
        whole = _undivided(module, batch * target, batch * source)
        load = Load(
            held_by(module, states),
            None if storages is None else sum(storages),
            sum(size for size in storages or () if size not in whole),
            [buffer.nbytes for buffer in _saved_buffers(module)],
            self._snapshots(),
            is_mixed,
        )
        return load, f"a batch of {batch} x {target} on each device"

    def _snapshots(self) -> int:
        callbacks: list[Callback | None] = [self._get(self.config_init, "loss_spike_recovery")]
        callbacks += self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        return sum(c.keep_snapshots for c in callbacks if isinstance(c, LossSpikeRecovery))


def _devices(settings: Any) -> tuple[int, str]:
    """How many, and where that is from."""
    if settings.devices is not None:
        if settings.devices < 1:
            raise UsageError(f"devices must be at least 1, got {settings.devices}")
        return settings.devices, "as asked for"
    configured = settings.trainer.devices
    if isinstance(configured, str) and configured.isdigit():
        configured = int(configured)
    number = len(configured) if isinstance(configured, list) else configured if isinstance(configured, int) else 0
    number *= settings.trainer.num_nodes
    return (number, "as configured") if number > 1 else (_DEVICES, "none being configured")


def batch_shape(data: LightningDataModule) -> tuple[int, int, int]:
    """Sequences of a batch of one device, tokens of each, and of each source; of the longest there can be.

    Raises:
        UsageError: If the data module does not say.
    """
    source = getattr(data, "block_size", None) or getattr(data, "max_length", None)
    target = getattr(data, "max_target_length", None) or source
    batch = getattr(data, "batch_size", None)
    if not isinstance(batch, int) or not isinstance(source, int) or not isinstance(target, int):
        raise UsageError(
            f"expected a data module with batch_size and with block_size or max_length, got {type(data).__name__}, "
            "which lacks one: give it these attributes"
        )
    most = getattr(data, "max_tokens", None)
    return (batch if most is None else max(1, most // max(source, target))), target, source


def activations(module: Any, batch: int, target: int, source: int) -> list[int] | None:
    """Bytes of each storage that is kept for the backward pass; None if the module is neither ours nor pretrained."""
    if isinstance(module, LitPretrained):
        names = ("input_ids", "decoder_input_ids") if module.kind == "seq2seq" else ("input_ids",)
        sizes = (source, target)

        def forward(call: Callable[..., Any]) -> Tensor:
            ids = {name: torch.zeros(batch, n, dtype=torch.long) for name, n in zip(names, sizes, strict=False)}
            return call(**ids, use_cache=False).logits  # type: ignore[no-any-return]

        return kept_storages(module.model, forward)
    if any(isinstance(part, Stack) for part in module.modules()):
        return activation_storages(module.model, batch, target, source)
    return None


def _attend_as_on_a_gpu(module: nn.Module) -> None:
    """Its kernels keep no matrix for the dropout of attention, and those of a CPU do."""
    for part in module.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.dropout = 0.0


def _undivided(module: Any, *tokens: int) -> set[int]:
    """Sizes of what tensor parallelism leaves whole: the residual stream and logits."""
    config = getattr(module, "config", None) or getattr(getattr(module, "model", None), "config", None)
    widths = [getattr(config, name, 0) for name in ("d_model", "hidden_size", "vocab_size")]
    return {n * width * item for n in tokens for width in widths for item in (2, 4)}


def _saved_buffers(module: nn.Module) -> list[Tensor]:
    return [
        buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]


def table(found: Iterable[Use]) -> list[str]:
    """A header, and a line for each strategy; in GiB, or in MiB where all is small."""
    found = list(found)
    unit, name = (2**30, "GiB") if max(use.total for use in found) >= 2**30 else (2**20, "MiB")
    lines = [f"{name:26}" + "".join(f"{column:>13}" for column in _COLUMNS)]
    for use in found:
        values = [getattr(use, column) for column in _COLUMNS]
        cells = (f"{'?':>13}" if value is None else f"{value / unit:>13,.2f}" for value in values)
        lines.append(f"{use.strategy:26}" + "".join(cells))
    return lines


def _legend(load: Load) -> str:
    known = "" if load.activations is not None else "; activations of this model are not known"
    snapshots = f"{load.keep_snapshots} snapshots of LossSpikeRecovery" if load.keep_snapshots else "no snapshots"
    return (
        f"Of the device that holds most{known}. Counted: parameters, gradients, the optimizer's states, {snapshots}. "
        "Estimated: activations, exchange (what is whole while a block computes, and buffers), and DeepSpeed. host and "
        "snapshots are in the machine's memory, for each device. Not in it: workspaces, fragmentation, a teacher."
    )


def _first_to_fit(found: Iterable[Use], gib: float) -> str:
    fits = next((use for use in found if use.total <= gib * 2**30), None)
    if fits is None:
        least = min(found, key=lambda use: use.total)
        return f"None fits {gib:g} GiB: {least.strategy} comes nearest. A smaller batch and checkpointing keep less."
    without = "" if fits.activations is not None else " without activations, which are not known"
    return f"The first to fit {gib:g} GiB is {fits.strategy}, with {fits.total / 2**30:,.2f}{without}."
