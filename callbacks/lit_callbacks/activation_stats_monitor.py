"""Is the residual stream growing, or growing outliers?"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_callbacks._errors import SetupError
from lit_callbacks._forward_observer import ForwardObserver
from lit_callbacks._names import clean_name, metric_key
from lit_callbacks._ranks import Measurement
from lit_callbacks.functional import power_sums, rms_and_kurtosis


class ActivationStatsMonitor(ForwardObserver):
    r"""Log how large the residual stream is after each block, and how heavy its tails.

    A stream that grows from block to block or from step to step, and a growing excess kurtosis
    :math:`E[(x-\mu)^4] / \sigma^4 - 3` (0 for a Gaussian), mean that a few dimensions grow out of proportion: they
    precede divergence and cost precision in bf16 and fp16 (Sun et al. 2024, *Massive Activations in Large Language
    Models*; Takase et al. 2023, *Spike No More*).

    Blocks are the outermost modules that an ``nn.ModuleList`` numbers, or an ``nn.Sequential`` with two or more of one
    class; what a block returns, or the first tensor of it, is the stream. Where a model has no such blocks a warning
    says so, and ``modules`` names them.

    Logs, every ``every_n_steps`` optimizer steps, and for all batches together in ``validate`` and ``test``:
        residual/rms_<layer>: root mean square of all elements.
        residual/max_<layer>: largest absolute element.
        residual/kurtosis_<layer>: excess kurtosis of all elements.

    Args:
        every_n_steps: Optimizer steps between measurements.
        modules: Glob over module names without wrapper prefixes, in place of the blocks, such as ``"*.mlp"``.

    Shapes:
        Any; elements of padded tokens count like others.

    Raises:
        ValueError: If ``every_n_steps`` is below 1, or when it starts, if ``modules`` matches nothing.

    State: none.

    Cost: on measured steps four passes over the output of each block, and one read by the host; nothing on others.

    Example:
        >>> ActivationStatsMonitor(modules="model.layers.*").every_n_steps
        50
    """

    serves_shards = True
    serves_zero = True

    def __init__(self, every_n_steps: int = 50, modules: str | None = None) -> None:
        super().__init__(every_n_steps)
        if modules == "":
            raise ValueError(f"modules must be a glob over module names, got {modules!r}")
        self.modules = modules
        self._blocks: set[str] = set()
        self._warned = False
        self.discard()

    def discard(self) -> None:
        """Forget what has been seen."""
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new run may warn again."""
        super().setup(trainer, pl_module, stage)
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks."""
        self._find(pl_module)

    def evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks."""
        super().evaluation_start(trainer, pl_module)
        self._find(pl_module)

    def _find(self, pl_module: LightningModule) -> None:
        if self.modules is None:
            self._blocks = set(blocks_of(pl_module))
            return
        names = [clean_name(name) for name, _ in pl_module.named_modules() if name]
        self._blocks = {name for name in names if fnmatchcase(name, self.modules)}
        if not self._blocks:
            raise SetupError(
                f"modules must match modules of {type(pl_module).__name__}, got {self.modules!r}, which matches "
                f"none of {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
            )

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Measure what a block returns."""
        if name in self._blocks:
            self.attempt(self._see, name, output)

    @torch.no_grad()
    def _see(self, name: str, output: Any) -> None:
        stream = _first_tensor(output)
        if stream is None:
            return
        low, high = torch.aminmax(stream)
        sums, largest = power_sums(stream), torch.maximum(-low, high).float().view(1)
        self._sums[name] = sums + self._sums[name] if name in self._sums else sums
        self._largest[name] = torch.maximum(largest, self._largest[name]) if name in self._largest else largest

    def collected(self, trainer: Trainer) -> Measurement:
        """Power sums and largest elements of this rank."""
        if not self._sums and not self._warned:
            self._warned = True
            rank_zero_warn(
                "ActivationStatsMonitor found no numbered blocks that were called; name the modules whose output is "
                "the residual stream, as in modules='*.blocks.*'."
            )
        return Measurement(self._sums, self._largest)

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """Moments, by layer."""
        values = {}
        for name, sums in total.sums.items():
            key = metric_key(name)
            values[f"residual/rms_{key}"], values[f"residual/kurtosis_{key}"] = rms_and_kurtosis(sums)
            values[f"residual/max_{key}"] = total.maxima[name][0]
        return values


def blocks_of(module: nn.Module) -> list[str]:
    """Names of the outermost modules with children that a list numbers, or a sequence with others of their class.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> blocks_of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        ['layers.0', 'layers.1']
    """
    names: list[str] = []
    for name, parent in module.named_modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or any(f"{name}.".startswith(f"{n}.") for n in names):
            continue
        children = dict(parent.named_children())
        classes = [type(child) for child in children.values() if any(True for _ in child.children())]
        if len(set(classes)) < len(classes) or (classes and isinstance(parent, nn.ModuleList)):
            names += [f"{name}.{i}" if name else i for i in children]
    return [clean_name(name) for name in names]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list) and output:
        return _first_tensor(output[0])
    return None
