"""Which parameters decay, which learn more slowly, and which do not learn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lit_transformer.errors import UsageError
from lit_transformer.optim.layers import layer_depths

_NO_DECAY = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Override:
    """What is different for parameters whose names match.

    Args:
        pattern: A glob over the names in ``module.named_parameters()``, such as ``model.blocks.0.*`` or ``*.bias``.
        lr_scale: What the learning rate is multiplied by.
        weight_decay: Instead of the optimizer's, also where there would be none; None leaves it.
        freeze: Do not train them at all.

    Raises:
        ValueError: If ``lr_scale`` or ``weight_decay`` is negative.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False

    def __post_init__(self) -> None:
        if self.lr_scale < 0:
            raise ValueError(f"lr_scale must be at least 0, got {self.lr_scale}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass(frozen=True)
class ParamGroups:
    """Split the trainable parameters into the groups of an optimizer.

    Biases, norms and embeddings do not decay: pulling them to zero moves what the layer can express instead of its
    complexity (GPT-3, Brown et al. 2020, and minGPT do the same). A matrix that serves as an embedding and as the
    output layer counts once, as an embedding.

    Args:
        layer_decay: Each layer learns at this share of the rate of the one above it, embeddings the slowest; 1 is the
            same for all. For fine-tuning, 0.65 to 0.95 (ELECTRA, Clark et al. 2020; BEiT).
        overrides: By name; of several that match, the last one counts.

    Raises:
        ValueError: If ``layer_decay`` is not above 0 and at most 1.

    Example:
        >>> groups = ParamGroups().build(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        >>> [(g["name"], len(g["params"])) for g in groups]
        [('decay', 1), ('no_decay', 3)]
    """

    layer_decay: float = 1.0
    overrides: Sequence[Override] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        made = tuple(Override(**o) if isinstance(o, Mapping) else o for o in self.overrides)
        object.__setattr__(self, "overrides", made)

    def freeze(self, model: nn.Module) -> None:
        """Let what is to be frozen need no gradient. Before a strategy wraps the model.

        Raises:
            UsageError: If a pattern matches no parameter.
        """
        names = [name for name, _ in model.named_parameters()]
        for override in self.overrides:
            if not any(fnmatchcase(name, override.pattern) for name in names):
                near = get_close_matches(override.pattern, names, n=3, cutoff=0.3)
                raise UsageError(
                    f"no parameter matches {override.pattern!r}; names are such as {', '.join(near or names[:3])}"
                )
        for name, parameter in model.named_parameters():
            own = self._override(name)
            if own is not None and own.freeze:
                parameter.requires_grad_(False)

    def build(
        self, model: nn.Module, hidden_apart: bool = False, dims: Mapping[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """The groups, for any torch optimizer.

        Args:
            model: Any module; what needs no gradient is left out.
            hidden_apart: Put the matrices inside of layers into groups of their own, for :class:`MuonAdamW`.
            dims: Numbers of dimensions by ``id``, where the model has flat pieces of its parameters only.

        Returns:
            Dicts with ``name``, ``params`` and ``lr_scale``, and ``weight_decay`` where it is not the optimizer's;
            with ``hidden_apart``, ``muon`` as well. Names are ``decay`` and ``no_decay`` (and ``hidden``), with the
            layer or the pattern in front where it matters.

        Raises:
            UsageError: If nothing is trainable.
        """
        depths = layer_depths(model)
        top = max(depths.values(), default=0)
        dims = dims or {id(parameter): parameter.ndim for parameter in model.parameters()}
        never = _never_decaying(model, dims)
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            override = self._override(name.replace("_fsdp_wrapped_module.", ""))
            hidden = hidden_apart and dims[id(parameter)] == 2 and id(parameter) not in never and 0 < depths[name] < top
            kind = "no_decay" if id(parameter) in never else "hidden" if hidden else "decay"
            scale = self.layer_decay ** (top - depths[name]) if self.layer_decay < 1 else 1.0
            prefix = f"layer_{depths[name]}_" if self.layer_decay < 1 else ""
            weight_decay = 0.0 if kind == "no_decay" else None
            if override is not None:
                scale *= override.lr_scale
                weight_decay = weight_decay if override.weight_decay is None else override.weight_decay
                prefix = f"{_slug(override.pattern)}_{prefix}"
            group = {"name": prefix + kind, "params": [], "lr_scale": scale}
            group |= {} if weight_decay is None else {"weight_decay": weight_decay}
            group |= {"muon": hidden} if hidden_apart else {}
            groups.setdefault((override, prefix, kind), group)["params"].append(parameter)
        if not groups:
            raise UsageError("there is nothing to train: every parameter of the model is frozen")
        return _with_unique_names(sorted(groups.values(), key=lambda group: str(group["name"]).endswith("no_decay")))

    def _override(self, name: str) -> Override | None:
        return next((o for o in reversed(self.overrides) if fnmatchcase(name, o.pattern)), None)


def _never_decaying(model: nn.Module, dims: Mapping[int, int]) -> set[int]:
    """Biases, norms, embeddings, and vectors of any kind."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NO_DECAY) or name.endswith("bias") or dims[id(parameter)] < 2
    }


def _slug(pattern: str) -> str:
    """A pattern as part of a metric's name, in which only letters, digits and _ may be."""
    return re.sub(r"[^A-Za-z0-9]+", "_", pattern).strip("_") or "all"


def _with_unique_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group["name"]] = seen.get(group["name"], 0) + 1
        group["name"] += f"_{count}" if count > 1 else ""
    return groups
