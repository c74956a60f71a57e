"""What a model is stacked of, whoever wrote it."""

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: what its outermost lists of modules of one class hold, in their order.

    Example:
        >>> from torch.nn import Linear, ModuleList, Sequential
        >>> layers = [Sequential(Linear(2, 2)), Sequential(Linear(2, 2))]
        >>> len(repeated_blocks(Sequential(Linear(2, 2), ModuleList(layers))))
        2
    """
    if isinstance(model, nn.ModuleList) and len({type(module) for module in model}) == 1 and all(map(_is_layer, model)):
        return list(model)
    return [block for child in model.children() for block in repeated_blocks(child)]


def _is_layer(module: nn.Module) -> bool:
    """Made of others, with parameters: single matrices in a list may be read in another way than by calling them."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
