"""How deep in a model is a parameter? Names of models that nobody here wrote are read, too."""

from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter: 0 for embeddings, 1 to n for the layers, n + 1 for what comes after.

    A layer is an element of an outermost ``ModuleList``: of BERT's ``encoder.layer``, GPT-2's ``h``, or either stack of
    T5, each counted from 1. Lists of less than half the average size do not count.
    Embeddings are ``nn.Embedding`` modules outside of layers, and what has ``embed`` in its name.

    Args:
        model: Any module.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
        >>> layer_depths(nn.ModuleDict({"embed": nn.Embedding(4, 2), "h": layers, "out": nn.Linear(2, 4, bias=False)}))
        {'embed.weight': 0, 'h.0.weight': 1, 'h.1.weight': 2, 'h.2.weight': 3, 'out.weight': 4}
    """
    stacks = _stacks(model)
    last = max((len(stack) for stack in stacks.values()), default=0) + 1
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    depths = {}
    for name, _ in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is not None:
            depths[name] = int(name[len(stack) + 1 :].partition(".")[0]) + 1
        elif name.rpartition(".")[0] in embeddings or "embed" in name:
            depths[name] = 0
        else:
            depths[name] = last
    return depths


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of layers, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    # ZeRO-3 leaves an empty parameter in place of each, and its size beside it.
    sizes = {name: sum(getattr(p, "ds_numel", p.numel()) for p in stack.parameters()) for name, stack in found.items()}
    average = sum(sizes.values()) / max(1, len(sizes))
    return {name: stack for name, stack in found.items() if 2 * sizes[name] >= average}
