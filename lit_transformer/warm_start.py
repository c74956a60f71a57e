"""Starting from the weights of another run, with another head."""

from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lit_transformer.checkpoint_files import read_checkpoint
from lit_transformer.errors import UsageError
from lit_transformer.optim.layers import layer_depths
from lit_transformer.strategies.tensor_parallel import part_of, stacked_orders

_MASKED = "model.head.dense.weight"  # of masked language models alone


def load_body(module: nn.Module, checkpoint: str | Path) -> None:
    """Copy a checkpoint's weights into a module, in place; what comes after the layers may differ, and then stays.

    From masked language modelling all tokens are taken but the mask, if the module has none.

    Args:
        module: The LightningModule to start.
        checkpoint: A Lightning checkpoint.

    Raises:
        UsageError: If the checkpoint cannot be read, or is of another architecture: if an embedding or a layer is
            missing on either side, or has another shape.
    """
    weights = read_checkpoint(checkpoint)["state_dict"]
    depths = layer_depths(module)
    top = max(depths.values(), default=0)
    own = dict(module.named_parameters())
    embedding = "model.encoder.token_embedding.weight"
    if _MASKED in weights and embedding in own and len(weights[embedding]) == len(own[embedding]) + 1:
        weights[embedding] = weights[embedding][:-1]  # the mask comes behind all other tokens
    fresh = []
    for name, parameter in own.items():
        fits = name in weights and weights[name].shape == parameter.shape
        if not fits and depths[name] < top:
            there = f"{tuple(weights[name].shape)} there" if name in weights else "not there"
            raise UsageError(
                f"{checkpoint} is of another architecture: {name} is {tuple(parameter.shape)} here and {there}"
            )
        if not fits:
            fresh.append(name)
    stacks = {name.partition(".blocks.")[0] + ".blocks." for name in own if ".blocks." in name}
    if beyond := [name for name in weights if name not in own and name.startswith(tuple(stacks))]:
        raise UsageError(
            f"{checkpoint} is of another architecture: it has {beyond[0]}, which is not here; see "
            f"model.init_args.config, which has {top - 1} layers here"
        )
    orders = stacked_orders(module)
    with torch.no_grad():
        for name, parameter in own.items():
            if name not in fresh:
                whole = weights[name][orders[name]] if name in orders else weights[name]
                parameter.copy_(part_of(whole, parameter))
    left = f"; newly initialised: {', '.join(fresh)}" if fresh else ""
    rank_zero_info(f"Weights of {checkpoint}: {len(own) - len(fresh)} of {len(own)} taken{left}.")
