"""Rules about the model."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lit_callbacks._deepspeed import numel
from lit_callbacks.gradual_unfreezing import GradualUnfreezing
from lit_callbacks.recipe.finding import rule
from lit_callbacks.recipe.plan import Plan

Found = Iterator[tuple[str, str]]

_LITTLE = 1000  # samples


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


@rule("eval-mode", "warning")
def eval_mode(plan: Plan) -> Found:
    """``from_pretrained`` returns a model in ``eval()``, and Lightning leaves it there."""
    modules = dict(plan.module.named_modules())
    asleep = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Dropout) and module.p > 0 and not module.training
        if any(p.requires_grad for p in modules[name.rpartition(".")[0]].parameters())
    ]
    if asleep:
        text = f"{len(asleep)} dropout modules are in eval mode, so nothing is dropped: {asleep[0]}."
        yield text, "Call train() on the model after loading it."


@rule("little-data", "note")
def little_data(plan: Plan) -> Found:
    """Few samples, and all of a pretrained model to be changed by them."""
    datasets: list[Any] = [getattr(loader, "dataset", None) for loader in plan.train_loaders]
    if not all(hasattr(dataset, "__len__") for dataset in datasets):
        return  # a stream
    samples = sum(map(len, datasets))
    callbacks = plan.trainer.callbacks  # type: ignore[attr-defined]  # what Lightning sets in another file
    if samples >= _LITTLE or any(isinstance(callback, GradualUnfreezing) for callback in callbacks):
        return
    for module in plan.module.modules():
        if not (pretrained := getattr(getattr(module, "config", None), "_name_or_path", "")):
            continue
        trained = sum(numel(p) for p in module.parameters() if p.requires_grad)
        if 2 * trained > sum(numel(p) for p in module.parameters()):
            text = f"{samples:,} samples train {trained:,} parameters of {pretrained}."
            yield text, f"Below {_LITTLE:,}, freeze all but the head; or use LoRA, or GradualUnfreezing."
            return
