"""Rules about optimizer, schedule, clipping and precision."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from lit_callbacks._ranks import tensor_parallel
from lit_callbacks._shards import local
from lit_callbacks.recipe.finding import rule
from lit_callbacks.recipe.plan import Plan

Found = Iterator[tuple[str, str]]

_ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_MANY = 0.1  # of a group of matrices; norms begin at 1, where this is so at any usual rate
_LOWER, _UPPER = 300.0, 15.0  # how far from the usual rate is unusual; fine-tuning is far below it


@rule("nothing-trainable", "error")
def nothing_trainable(plan: Plan) -> Found:
    """Every parameter is frozen, or no optimizer has any."""
    held = sum(p.requires_grad for o in plan.optimizers for group in o.param_groups for p in group["params"])
    if not held:
        yield "No optimizer has a parameter that is trained.", "Unfreeze some, or give them to the optimizer."


@rule("parameters-left-out", "warning")
def parameters_left_out(plan: Plan) -> Found:
    """Parameters that need a gradient and are in no optimizer."""
    held = {id(p) for o in plan.optimizers for group in o.param_groups for p in group["params"]}
    left = [name for name, p in plan.module.named_parameters() if p.requires_grad and id(p) not in held]
    if left and held:
        yield (
            f"{len(left)} parameters are trained by no optimizer, such as {left[0]}.",
            "Give them to the optimizer, or freeze them with requires_grad_(False).",
        )


@rule("lr-zero", "error")
def lr_zero(plan: Plan) -> Found:
    """A learning rate that is zero from the first update to the last."""
    if any(groups and max(groups) == 0 for groups in plan.peaks()):
        yield "The learning rate is 0 for the whole run.", "Look at lr and at what the schedule multiplies it by."


@rule("post-ln-without-warmup", "error")
def post_ln_without_warmup(plan: Plan) -> Found:
    """Post-LN may stay at the loss of guessing by frequency when it starts at the full rate (Xiong et al. 2020)."""
    if plan.is_post_norm and plan.warmup == 0:
        yield (
            "The model is post-LN and starts at the full learning rate: it may never learn, without any other sign.",
            "Warm up over 1 to 10 % of the run, or use pre-LN.",
        )


@rule("no-warmup", "warning")
def no_warmup(plan: Plan) -> Found:
    """A transformer that starts at the full learning rate."""
    if plan.has_attention and not plan.is_post_norm and plan.warmup == 0:
        yield "The first update has the full learning rate.", "Warm up over 1 to 10 % of the run."


@rule("warmup-length", "note")
def warmup_length(plan: Plan) -> Found:
    """A warm-up outside of what is usual."""
    if not plan.warmup or plan.steps is None:
        return
    share = plan.warmup / plan.steps
    if not 0.005 <= share <= 0.11:  # with room for where the points of the curve are
        yield f"The warm-up is {100 * share:.2g} % of the {plan.steps} updates.", "1 to 10 % is usual."


@rule("no-clipping", "warning")
def no_clipping(plan: Plan) -> Found:
    """Nothing limits the gradient of a bad batch."""
    names = {type(callback).__name__ for callback in plan.trainer.callbacks}  # type: ignore[attr-defined]
    clipped = plan.trainer.gradient_clip_val or "AdaptiveGradientClipping" in names
    if plan.has_attention and plan.module.automatic_optimization and not clipped:
        yield "Gradients are not clipped.", "Set Trainer(gradient_clip_val=1.0), or use AdaptiveGradientClipping."


@rule("decay-on-norms", "warning")
def decay_on_norms(plan: Plan) -> Found:
    """Weight decay pulls biases, norms and embeddings to zero."""
    names = {id(p): name for name, p in plan.module.named_parameters()}
    never = {
        id(p)
        for module in plan.module.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(module, (*_NORMS, nn.Embedding)) or len(plan.shapes[id(p)]) < 2
    }
    decayed = [
        names.get(id(p), "?")
        for o in plan.optimizers
        for group in o.param_groups
        if group.get("weight_decay")
        for p in group["params"]
        if id(p) in never
    ]
    if decayed:
        yield (
            f"Weight decay is on {len(decayed)} biases, norms or embeddings, such as {decayed[0]}.",
            "Put them into a parameter group with weight_decay=0.",
        )


@rule("coupled-decay", "warning")
def coupled_decay(plan: Plan) -> Found:
    """Adam adds the decay to the gradient, and then divides it by the gradient's size (Loshchilov and Hutter 2019)."""
    for optimizer in plan.optimizers:
        for group in optimizer.param_groups if isinstance(optimizer, _ADAMS) else ():
            if group.get("weight_decay") and not group.get("decoupled_weight_decay", False):
                name = type(optimizer).__name__
                yield (
                    f"{name}(weight_decay={group['weight_decay']}) adds the decay to the gradient.",
                    "Use AdamW, or decoupled_weight_decay=True.",
                )
                return


@rule("adam-precision", "warning")
def adam_precision(plan: Plan) -> Found:
    """Second moments, or updates, that the parameters' precision cannot hold."""
    for i, optimizer in enumerate(plan.optimizers):
        for j, group in enumerate(optimizer.param_groups if isinstance(optimizer, _ADAMS) else ()):
            dtypes = {p.dtype for p in group["params"]}
            beta2, eps = float(group["betas"][1]), float(group["eps"])
            if torch.float16 in dtypes and eps < torch.finfo(torch.float16).smallest_normal / 1024:
                yield (
                    f"eps={eps:g} is 0 in fp16.",
                    "Keep the parameters in fp32 (precision 16-mixed), or eps above 1e-4.",
                )
                return
            if torch.bfloat16 in dtypes and 1 - beta2 < torch.finfo(torch.bfloat16).eps / 2:
                yield (
                    f"With parameters in bf16, a second moment with beta2={beta2:g} cannot follow the gradient: its "
                    "updates are rounded away.",
                    "Keep the parameters in fp32 (precision bf16-mixed), or beta2 at 0.99 or below.",
                )
                return
            if torch.bfloat16 not in dtypes:
                continue
            peak = plan.peaks()[i][j]
            if (share := _share_that_stays(group["params"], peak)) > _MANY:
                yield (
                    f"With parameters in bf16, {share:.0%} of group {group.get('name', j)} are so large that updates "
                    f"of the learning rate, {peak:.2g}, are rounded away.",
                    "Keep the parameters in fp32 (precision bf16-mixed).",
                )
                return


def _share_that_stays(parameters: list[torch.Tensor], rate: float) -> float:
    """Of what is in bf16: numbers that Adam's updates, about as large as the rate, leave as they are."""
    tensors = [local(p.detach()) for p in parameters if p.dtype == torch.bfloat16 and p.ndim > 1]
    # The next number is at least 1/256 of it away, and an update of less than half of that is no update.
    limit = rate / (torch.finfo(torch.bfloat16).eps / 4)
    stay = sum(int((tensor.abs() > limit).sum()) for tensor in tensors)
    return stay / max(1, sum(tensor.numel() for tensor in tensors))


@rule("fp16-without-scaler", "error")
def fp16_without_scaler(plan: Plan) -> Found:
    """Gradients below 6e-8 are 0 in fp16 unless the loss is scaled."""
    fp16 = any(p.dtype == torch.float16 for p in plan.module.parameters() if p.requires_grad)
    if fp16 and plan.trainer.scaler is None:
        yield "Parameters are in fp16 and the loss is not scaled.", "Use precision 16-mixed or bf16-mixed."


@rule("lr-range", "warning")
def lr_range(plan: Plan) -> Found:
    """Far from where models of this size are trained (Kaplan et al. 2020, equation D.1, for Adam)."""
    size = sum(plan.shapes[id(p)].numel() for p in plan.module.parameters())
    if not plan.has_attention or size < 1000:
        return
    usual = max(1e-4, 0.003239 - 0.0001395 * math.log(size))
    for optimizer, peaks in zip(plan.optimizers, plan.peaks(), strict=True):
        peak = max(peaks, default=0.0)
        if isinstance(optimizer, _ADAMS) and peak > 0 and not usual / _LOWER <= peak <= usual * _UPPER:
            yield (
                f"The highest learning rate is {peak:.2g}; from scratch, {usual:.1g} is usual at "
                f"{size / 1e6:.3g} M parameters.",
                "Look at lr and the schedule; lr_find measures it.",
            )


@rule("effective-batch", "note")
def effective_batch(plan: Plan) -> Found:
    """The batch that a step sees grows with the devices."""
    parts = plan.trainer.world_size // tensor_parallel(plan.trainer)[1]
    if parts > 1 and not getattr(plan.module, "target_batch_tokens", None):
        accumulated = plan.trainer.accumulate_grad_batches
        text = f"A step sees {parts} x {accumulated} batches of the loader's size."
        yield text, "Adapt learning rate or batch size to it when the number of devices changes."
