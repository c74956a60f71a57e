"""Is attention collapsing, or has it never begun to choose?"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lit_callbacks._alarms import InARow, OwnPast, raise_alarm
from lit_callbacks._attention_calls import from_multi_head, from_scaled_dot_product, from_softmax
from lit_callbacks._forward_observer import ForwardObserver
from lit_callbacks._intercept import Call
from lit_callbacks._names import metric_key
from lit_callbacks._ranks import Measurement
from lit_callbacks.functional import ENTROPY_BINS, AttentionStatistics, histogram_quantile

COLLAPSED = 0.05
"""A row whose normalised entropy is below this counts as collapsed."""

LEFT_UNIFORM = 0.9
"""Attention has left uniform once the 5th percentile of a head's normalised entropy has been below this."""


class AttentionEntropyMonitor(ForwardObserver):
    r"""Log how concentrated each attention layer is, and say when it collapses or never begins to choose.

    A row of attention weights :math:`a` over :math:`n` visible keys has normalised entropy :math:`-\sum_j a_j \log a_j
    / \log n`, from 0 (one key) to 1 (uniform). A sustained fall often precedes divergence (Zhai et al., ICML 2023,
    *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*), and so does a growing largest logit
    (Wortsman et al. 2023, *Small-scale proxies for large-scale Transformer training instabilities*). Padded queries and
    rows with a single visible key are left out, and so is attention dropout. Computed in fp32 also under autocast.

    Attention is seen where it goes through ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward``
    (``nn.MultiheadAttention``, ``nn.TransformerEncoder``), or a softmax over 3- or 4-dimensional scores in a module
    whose name or class says attention: Hugging Face (``sdpa`` and ``eager``), torch.nn, x-transformers, litgpt and most
    written by hand. Attention modules in which nothing of the kind was called, such as those of the flash-attn package,
    are named in a warning, and a model without attention gets one as well.

    Two alarms go to ``events.jsonl`` in the run folder and, as a warning, to the console. *entropy_collapse*: the mean
    entropy of a head has been below ``collapse_ratio`` times its own running median in three measurements in a row.
    *attention_uniform*: after ``uniform_after`` steps no head of the model has ever left uniform attention, which is
    how a post-LN transformer without warm-up fails, with no other sign.

    Logs, every ``every_n_steps`` optimizer steps, and for all batches together in ``validate`` and ``test``:
        attention_entropy/<layer>: mean normalised entropy over rows and heads.
        attention_entropy/min: the smallest mean of a head. Also in ``trainer.callback_metrics``.
        attention_entropy_p5/<layer>: 5th percentile of the rows' normalised entropy, mean over heads, to 0.01.
        attention_collapsed/<layer>: share of rows with a normalised entropy below 0.05.
        attention_logit_max/<layer>: largest attention logit, with scale and bias.
        attention_first/<layer>: mean attention to the first key, which is the CLS token where there is one.

    Args:
        every_n_steps: Optimizer steps between measurements.
        per_head: Also log ``attention_entropy/<layer>_head_<i>``.
        collapse_ratio: Fraction of its own running median below which a head's entropy counts as collapsed.
        uniform_after: Optimizer steps after which uniform attention is an alarm.

    Shapes:
        Queries ``(batch, heads, T, d)`` or one head ``(batch, T, d)``; fewer key heads than query heads are repeated.

    Raises:
        ValueError: If an argument is out of range.

    State: the last 20 accepted entropies of each head, and whether attention has left uniform.

    Cost: on measured steps one blockwise pass over the attention logits, about a seventh of a materialised softmax,
    with memory linear in the sequence length, and one read by the host; nothing on other steps.

    Example:
        >>> AttentionEntropyMonitor(every_n_steps=100).collapse_ratio
        0.5
    """

    def __init__(
        self, every_n_steps: int = 50, per_head: bool = False, collapse_ratio: float = 0.5, uniform_after: int = 300
    ) -> None:
        super().__init__(every_n_steps)
        if not 0 < collapse_ratio < 1:
            raise ValueError(f"collapse_ratio must be between 0 and 1, got {collapse_ratio}")
        if uniform_after < 1:
            raise ValueError(f"uniform_after must be at least 1, got {uniform_after}")
        self.per_head = per_head
        self.collapse_ratio = collapse_ratio
        self.uniform_after = uniform_after
        self._past = OwnPast(window=20)
        self._collapsing = InARow(patience=3)
        self._left_uniform = False
        self._heads: dict[str, int] = {}
        self._warned = False
        self.discard()

    def discard(self) -> None:
        """Forget what has been seen."""
        self._seen: dict[str, AttentionStatistics] = {}
        self._entered: dict[str, None] = {}

    def handlers(self) -> dict[Callable[..., Any], Callable[[Call], None]]:
        """Every way to compute attention."""
        return {
            F.scaled_dot_product_attention: lambda call: self.attempt(self._see, call, from_scaled_dot_product),
            F.multi_head_attention_forward: lambda call: self.attempt(self._see, call, from_multi_head),
            **dict.fromkeys(
                (F.softmax, torch.softmax, Tensor.softmax), lambda call: self.attempt(self._see, call, from_softmax)
            ),
        }

    def _see(self, call: Call, read: Callable[[Call], AttentionStatistics | None]) -> None:
        new = read(call)
        if new is not None:
            old = self._seen.get(call.name)
            self._seen[call.name] = new if old is None else _add(old, new)

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Remember which modules should have been seen."""
        if "attention" in type(module).__name__.lower():
            self._entered[name] = None

    def collected(self, trainer: Trainer) -> Measurement:
        """Tables and largest logits of this rank."""
        self._warn_of_unseen()
        return Measurement(
            {name: seen.table for name, seen in self._seen.items()},
            {name: seen.largest for name, seen in self._seen.items()},
        )

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """Means over heads, and the mean of each head."""
        if not total.sums:
            return {}
        self._heads = {name: len(table) for name, table in total.sums.items()}
        table = torch.cat(list(total.sums.values()))
        histogram, (rows, entropy, first) = table[:, :ENTROPY_BINS], table[:, ENTROPY_BINS:].unbind(1)
        collapsed = histogram[:, : round(COLLAPSED * ENTROPY_BINS)].sum(1) / rows
        by_head = torch.stack([entropy / rows, histogram_quantile(histogram, 0.05), collapsed, first / rows])
        values = {"attention_entropy/min": by_head[0].min()}
        layers = by_head.split(list(self._heads.values()), dim=1)
        for (name, largest), layer in zip(total.maxima.items(), layers, strict=True):
            key = metric_key(name)
            values[f"attention_logit_max/{key}"] = largest.max()
            means = layer.mean(1).unbind()
            for metric, mean in zip(("entropy", "entropy_p5", "collapsed", "first"), means, strict=True):
                values[f"attention_{metric}/{key}"] = mean
            for head, mean in enumerate(layer[0].unbind()):
                values[f"attention_entropy/{key}_head_{head}"] = mean
            values[f"p5 {key}"] = layer[1].min()
        return values

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Log, and judge each head by its own past."""
        p5 = [values.pop(f"p5 {metric_key(name)}") for name in self._heads]
        heads = {
            f"attention_entropy/{metric_key(name)}_head_{head}": f"{name}, head {head}"
            for name, count in self._heads.items()
            for head in range(count)
        }
        entropies = {where: values[key] if self.per_head else values.pop(key) for key, where in heads.items()}
        super().record(trainer, pl_module, step, values)
        if trainer.state.fn == "fit":
            self._judge(step, entropies, min(p5))

    def summary(self, values: Mapping[str, float]) -> list[str]:
        """The smallest of all."""
        return ["attention_entropy/min"]

    def _judge(self, step: int, entropies: Mapping[str, float], smallest_p5: float) -> None:
        outside = self._past.outside(entropies, low=self.collapse_ratio)
        collapses = {head: bad and math.isfinite(entropies[head]) for head, bad in outside.items()}
        if where := self._collapsing.judge(collapses):
            raise_alarm(
                self.events, step, "entropy_collapse", where,
                f"attention entropy has fallen below {self.collapse_ratio} of its running median in {{where}}. The "
                "loss may follow: lower the learning rate, warm up longer, or normalise queries and keys.",
                entropies={head: entropies[head] for head in where},
            )  # fmt: skip
        if smallest_p5 < LEFT_UNIFORM:
            self._left_uniform = True
        if not self._left_uniform and step >= self.uniform_after:
            self._left_uniform = True  # said once
            raise_alarm(
                self.events, step, "attention_uniform", list(self._heads),
                f"after {step} steps every attention head still attends to all its keys alike: the model is not "
                "learning from context. With post-LN, warm up the learning rate; with any, try a lower one.",
                smallest_p5=smallest_p5,
            )  # fmt: skip

    def _warn_of_unseen(self) -> None:
        if self._warned:
            return
        self._warned = True
        unseen = [
            name for name in self._entered
            if not any(seen == name or seen.startswith(f"{name}.") for seen in self._seen)
            and not any(other.startswith(f"{name}.") for other in self._entered)
        ]  # fmt: skip
        if unseen:
            rank_zero_warn(
                f"AttentionEntropyMonitor cannot see into {', '.join(unseen)}: nothing in there called "
                "scaled_dot_product_attention, multi_head_attention_forward or softmax, as is the case for external "
                "flash kernels and flex_attention. Use attn_implementation='sdpa', or call "
                "F.scaled_dot_product_attention."
            )
        elif not self._seen:
            rank_zero_warn("AttentionEntropyMonitor saw no attention in this model; there is nothing it could log.")

    def state_dict(self) -> dict[str, Any]:
        """The past of each head."""
        return {
            "past": self._past.state_dict(),
            "collapsing": dict(self._collapsing.counts),
            "left_uniform": self._left_uniform,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on judging."""
        self._past.values = {name: list(values) for name, values in state_dict["past"].items()}
        self._collapsing.counts = dict(state_dict["collapsing"])
        self._left_uniform = state_dict["left_uniform"]


def _add(a: AttentionStatistics, b: AttentionStatistics) -> AttentionStatistics:
    return AttentionStatistics(a.table + b.table, torch.maximum(a.largest, b.largest))
