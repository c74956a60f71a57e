"""Layer names that are the same with and without compile, DDP, FSDP and activation checkpointing."""

import re
from functools import cache

# A model with adapters of peft is at `base_model.model`, and a linear layer with them at its own `base_layer`.
_PEFT = re.compile(r"\bbase_model\.model\.|\bbase_model\.model$|\.base_layer\b")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@cache
def clean_name(name: str) -> str:
    """Path of a module or parameter without wrapper prefixes; ``module`` counts only in front, where DDP puts it.

    Example:
        >>> clean_name("module._orig_mod.blocks.0._checkpoint_wrapped_module.attention.weight")
        'blocks.0.attention.weight'
        >>> clean_name("net.base_model.model.layers.0.q_proj.base_layer.weight")
        'net.layers.0.q_proj.weight'
    """
    parts = [part for part in _PEFT.sub("", name).split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0:1] == ["module"] and len(parts) > 1 else parts)


@cache
def metric_key(name: str) -> str:
    """The last part of a metric key: the clean name in ``[A-Za-z0-9_]``.

    Example:
        >>> metric_key("model._orig_mod.blocks.0.attention")
        'model_blocks_0_attention'
    """
    return re.sub(r"[^A-Za-z0-9_]", "_", clean_name(name))
