"""Rules about the model."""

from collections.abc import Iterator

from torch import nn

from lit_callbacks.recipe.finding import rule
from lit_callbacks.recipe.plan import Plan

Found = Iterator[tuple[str, str]]


@rule("high-dropout", "warning")
def high_dropout(plan: Plan) -> Found:
    """More dropout than transformers are trained with."""
    high = {name: m.p for name, m in plan.module.named_modules() if isinstance(m, nn.Dropout) and m.p > 0.3}
    high |= {
        name: float(m.dropout)
        for name, m in plan.module.named_modules()
        if isinstance(m, nn.MultiheadAttention) and m.dropout > 0.3
    }
    if high:
        name, p = next(iter(high.items()))
        others = f" and {len(high) - 1} others" if len(high) > 1 else ""
        yield f"Dropout is {p:g} in {name}{others}.", "0 to 0.1 is usual, up to 0.3 with little data."


@rule("batchnorm", "warning")
def batchnorm(plan: Plan) -> Found:
    """Batch statistics of padded sequences of different lengths mean little (Shen et al. 2020)."""
    found = [name for name, m in plan.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if found and plan.has_attention:
        yield f"There is BatchNorm in a transformer: {found[0]}.", "Use LayerNorm or RMSNorm."


@rule("tied-weights-broken", "error")
def tied_weights_broken(plan: Plan) -> Found:
    """The configuration says that input and output embeddings are one, and they are two."""
    for module in plan.module.modules():
        config = getattr(module, "config", None)
        says = getattr(config, "tie_word_embeddings", False)
        if not says or not callable(getattr(module, "get_output_embeddings", None)):
            continue
        into, out = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
        if into is not None and out is not None and into.weight is not out.weight:
            yield (
                f"{type(module).__name__} ties its embeddings by its configuration, but its output layer has a weight "
                "of its own.",
                "Call tie_weights() after replacing either of them, or set tie_word_embeddings to false.",
            )
            return
