"""Which parameters belong together: by layer, by what they do, each by itself, or by the user's globs."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lit_callbacks._errors import SetupError
from lit_callbacks._names import clean_name, metric_key

KINDS = ("attention_in", "attention_out", "feed_forward_in", "feed_forward_out", "norm", "embedding", "head", "other")

_ATTENTION = re.compile(r"attn|attention|attend|\.(to_)?[qkv](_proj)?\.|\.to_out\.|qkv", re.IGNORECASE)
_OUT = re.compile(
    r"\.(out|out_proj|o_proj|c_proj|proj|to_out|o|wo|down|down_proj|output|linear2|fc2|w2|dense_4h_to_h)\."
)


class ParameterGroups:
    """Named groups of a module's parameters, for sums over them. A parameter may be in several groups, or in none.

    Args:
        module: The module; shared parameters count once, under their first name.
        by: Each ``"layers"`` (index of the block), ``"kinds"`` (see :func:`kind_of`), ``"parameters"`` (each by
            itself), or a glob over parameter names without wrapper prefixes.
        shapes: Shapes of parameters by ``id``, where the module has pieces of them only.

    Raises:
        ValueError: If a glob matches nothing, or two groups get the same name.

    Example:
        >>> groups = ParameterGroups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), ["layers", "*.bias"])
        >>> groups.names
        ['layer_0', 'layer_1', '__bias']
    """

    def __init__(self, module: nn.Module, by: Sequence[str], shapes: Mapping[int, torch.Size] | None = None) -> None:
        owners = {
            f"{name}.{parameter}" if name else parameter: owner
            for name, owner in module.named_modules()
            for parameter, _ in owner.named_parameters(recurse=False)
        }
        named = list(module.named_parameters())
        self.parameters = [clean_name(name) for name, _ in named]
        self._index = {id(parameter): i for i, (_, parameter) in enumerate(named)}
        groups: dict[str, list[int]] = {}
        for rule in dict.fromkeys(by):
            labels = _labels(rule, self.parameters, [owners[name] for name, _ in named], shapes or {})
            for label, members in labels.items():
                if label in groups:
                    raise SetupError(f"groups must have different names, got two called {label!r} from {list(by)}")
                groups[label] = members
        self.names, self.members = list(groups), groups
        self._member = torch.tensor([i for members in groups.values() for i in members], dtype=torch.long)
        self._group = torch.tensor([g for g, members in enumerate(groups.values()) for _ in members], dtype=torch.long)

    def place(self, parameters: Sequence[Tensor], values: Tensor) -> Tensor:
        """One value for each parameter of the module, 0 for those not given. Parameters of others are left out."""
        places = [self._index.get(id(parameter), -1) for parameter in parameters]
        if -1 in places:
            values = values[[i for i, place in enumerate(places) if place >= 0]]
        index = torch.tensor([place for place in places if place >= 0], dtype=torch.long, device=values.device)
        return values.new_zeros(len(self.parameters)).index_copy_(0, index, values)

    def sort(self, parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Those of some parameters that are in each group; groups that have none of them are left out."""
        given = {self._index.get(id(parameter), -1): parameter for parameter in parameters}
        sorted_in = {name: [given[i] for i in members if i in given] for name, members in self.members.items()}
        return {name: inside for name, inside in sorted_in.items() if inside}

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each group of one value for each parameter, shape ``(len(names),)``."""
        members, group = self._member.to(values.device), self._group.to(values.device)
        return values.new_zeros(len(self.names)).index_add_(0, group, values[members])


def _labels(
    rule: str, names: list[str], owners: list[nn.Module], shapes: Mapping[int, torch.Size]
) -> dict[str, list[int]]:
    labels: dict[str, list[int]] = defaultdict(list)
    if rule == "parameters":
        return {metric_key(name): [i] for i, name in enumerate(names)}
    if rule == "layers":
        labels.update(layers_of(names))
    elif rule == "kinds":
        weights = [getattr(owner, "weight", None) for owner in owners]
        whole = [shapes.get(id(w), w.shape) if isinstance(w, Tensor) else None for w in weights]
        kinds = list(map(kind_of, names, owners, whole))
        for kind in KINDS:
            if kind in kinds:
                labels[kind] = [i for i, k in enumerate(kinds) if k == kind]
    else:
        labels[metric_key(rule)] = [i for i, name in enumerate(names) if fnmatchcase(name, rule)]
        if not labels[metric_key(rule)]:
            raise SetupError(
                f"groups must be 'layers', 'kinds', 'parameters' or globs that match parameters, got {rule!r}, which "
                f"matches none of {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            )
    return labels


def layers_of(names: Sequence[str]) -> Mapping[str, list[int]]:
    """The indices of the parameters of each numbered block, the outermost number counting.

    Blocks are called ``layer_<i>`` where all are numbered in the same place, else ``<place>_<i>``.

    Example:
        >>> layers_of(["emb.weight", "blocks.0.w", "blocks.0.mlp.2.w", "blocks.1.w"])
        {'layer_0': [1, 2], 'layer_1': [3]}
        >>> list(layers_of(["encoder.block.0.w", "decoder.block.0.w"]))
        ['encoder_block_0', 'decoder_block_0']
    """
    blocks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if found := re.match(r"(.*?)\.?\b(\d+)\.", name):
            blocks[found[1], found[2]].append(i)
    one_place = len({place for place, _ in blocks}) == 1
    return {f"{'layer' if one_place else metric_key(place)}_{i}": members for (place, i), members in blocks.items()}


def kind_of(name: str, owner: nn.Module, weight: torch.Size | None) -> str:
    """What a parameter does, one of :data:`KINDS`, told by names and shapes: no library marks it.

    Args:
        name: Its name.
        owner: The module that has it.
        weight: The shape of that module's weight, if it has one.

    Example:
        >>> kind_of("h.0.attn.c_proj.weight", nn.Linear(4, 4), torch.Size([4, 4]))
        'attention_out'
        >>> kind_of("h.0.mlp.0.weight", nn.Linear(4, 16), torch.Size([16, 4]))
        'feed_forward_in'
    """
    if "norm" in type(owner).__name__.lower() or re.search(r"(norm|\bln_?\w*)\.(weight|bias)$", name):
        return "norm"
    layer = re.search(r"(?:^|\.)\d+(\..*)", name)
    if layer is None:
        if isinstance(owner, nn.Embedding) or re.search(r"emb|wte|wpe|\.pos|token", name, re.IGNORECASE):
            return "embedding"
        return "head" if isinstance(owner, nn.Linear) else "other"
    inside = layer[1]
    if isinstance(owner, nn.Embedding):
        return "embedding"
    out = _OUT.search(inside) is not None
    if _ATTENTION.search(inside):
        return "attention_out" if out else "attention_in"
    if weight is None or len(weight) != 2:
        return "other"
    narrows = weight[0] < weight[1]
    if type(owner).__name__ == "Conv1D":  # Hugging Face's, stored the other way round
        narrows = not narrows
    return "feed_forward_out" if out or narrows else "feed_forward_in"
