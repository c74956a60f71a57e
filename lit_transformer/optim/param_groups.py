"""Which parameters decay."""

from typing import Any

from torch import nn

_NO_DECAY = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that never do.

    Biases, norms and embeddings do not decay: pulling them to zero moves what the layer can express instead of its
    complexity (GPT-3, Brown et al. 2020, and minGPT do the same). A matrix that serves as an embedding and as the
    output layer counts once, as an embedding.

    Args:
        model: Any module; frozen parameters are left out.

    Returns:
        Parameter groups for a torch optimizer, named ``decay`` and ``no_decay``, the latter with ``weight_decay`` 0.
        An empty group is left out.

    Example:
        >>> [(g["name"], len(g["params"])) for g in decay_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))]
        [('decay', 1), ('no_decay', 3)]
    """
    never = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NO_DECAY) or name.endswith("bias") or parameter.ndim < 2
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [p for p in trainable if id(p) not in never]},
        {"name": "no_decay", "params": [p for p in trainable if id(p) in never], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
