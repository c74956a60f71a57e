"""Is attention collapsing, or has it never begun to choose?"""

import statistics
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
from lit_callbacks._listeners import tell_values
from lit_callbacks._names import metric_key
from lit_callbacks._ranks import Measurement, side_by_side
from lit_callbacks.functional import ENTROPY_BINS, AttentionStatistics, histogram_quantile

COLLAPSED = 0.05
"""A row whose normalised entropy is below this counts as collapsed."""

UNIFORM = 0.99
"""Attention is uniform where the median over all heads of their mean normalised entropy is above this."""


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

    Two alarms go to ``events.jsonl`` in the run folder and, as a warning, to the console. *entropy_collapse*: twice in
    a row the mean entropy of a head was below ``collapse_ratio`` times its own running median while its largest logit
    was above ``collapse_logit``. Either alone is healthy: heads sharpen when they learn what to look at, and logits
    grow. *attention_uniform*: from step ``uniform_after`` on, three times in a row, most heads have attended to all
    their keys alike, which is how a deep post-LN transformer without warm-up fails, with no other sign. How long
    before the loss they speak, ``benchmarks/early_warning.py`` measures.

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
        collapse_ratio: Fraction of its own running median below which a head's entropy counts as collapsed,
        collapse_logit: if its largest logit is above this, too.
        uniform_after: Optimizer steps after which uniform attention is an alarm; until then it may be early training.

    Shapes:
        Queries ``(batch, heads, T, d)`` or one head ``(batch, T, d)``; fewer key heads than query heads are repeated.

    Raises:
        ValueError: If an argument is out of range.

    State: the last 20 accepted entropies of each head, and how often in a row each alarm's condition was met.

    Cost: on measured steps one blockwise pass over the attention logits, about a seventh of a materialised softmax,
    with memory linear in the sequence length, and one read by the host; nothing on other steps.

    Example:
        >>> AttentionEntropyMonitor(every_n_steps=100).collapse_ratio
        0.5
    """

    serves_shards = True
    serves_zero = True

    def __init__(
        self,
        every_n_steps: int = 50,
        per_head: bool = False,
        collapse_ratio: float = 0.5,
        collapse_logit: float = 50.0,
        uniform_after: int = 500,
    ) -> None:
        super().__init__(every_n_steps)
        if not 0 < collapse_ratio < 1:
            raise ValueError(f"collapse_ratio must be between 0 and 1, got {collapse_ratio}")
        if collapse_logit <= 0:
            raise ValueError(f"collapse_logit must be above 0, got {collapse_logit}")
        if uniform_after < 1:
            raise ValueError(f"uniform_after must be at least 1, got {uniform_after}")
        self.per_head = per_head
        self.collapse_ratio = collapse_ratio
        self.collapse_logit = collapse_logit
        self.uniform_after = uniform_after
        self._past = OwnPast(window=20, least=3)
        self._collapsing, self._uniform = InARow(patience=2), InARow(patience=3)
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
            {name: side_by_side(trainer, seen.table) for name, seen in self._seen.items()},
            {name: side_by_side(trainer, seen.largest, -torch.inf) for name, seen in self._seen.items()},
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
            for head, (entropy, logit) in enumerate(zip(layer[0].unbind(), largest.unbind(), strict=True)):
                values[f"attention_entropy/{key}_head_{head}"] = entropy
                values[f"logit {key} {head}"] = logit
        return values

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Log, and judge each head by its own past."""
        entropies, logits, not_logged = {}, {}, {}
        for name, count in self._heads.items():
            key = metric_key(name)
            for head in range(count):
                where = f"{name}, head {head}"
                logits[where] = values.pop(f"logit {key} {head}")
                entropies[where] = values[f"attention_entropy/{key}_head_{head}"]
                if not self.per_head:
                    not_logged[f"attention_entropy/{key}_head_{head}"] = values.pop(
                        f"attention_entropy/{key}_head_{head}"
                    )
        super().record(trainer, pl_module, step, values)
        if trainer.state.fn == "fit":
            tell_values(trainer, step, not_logged, logged=False)
            self._judge(step, entropies, logits)

    def summary(self, values: Mapping[str, float]) -> list[str]:
        """The smallest of all."""
        return ["attention_entropy/min"]

    def _judge(self, step: int, entropies: Mapping[str, float], logits: Mapping[str, float]) -> None:
        normal = self._past.medians(entropies)
        collapsed = {
            head: entropy < self.collapse_ratio * normal[head] and logits[head] > self.collapse_logit
            for head, entropy in entropies.items()
        }
        self._past.keep({head: entropy for head, entropy in entropies.items() if not collapsed[head]})
        if where := self._collapsing.judge(collapsed):
            raise_alarm(
                self.events, step, "entropy_collapse", where,
                f"attention collapses in {{where}}: entropy below {self.collapse_ratio} of its running median, logits "
                f"above {self.collapse_logit:g}. The loss may follow: lower the learning rate, warm up longer, or "
                "normalise queries and keys.",
                entropies={head: entropies[head] for head in where},
            )  # fmt: skip
        median = statistics.median(entropies.values())
        if self._uniform.judge({"all": step >= self.uniform_after and median > UNIFORM}):
            raise_alarm(
                self.events, step, "attention_uniform", list(self._heads),
                f"after {step} steps most attention heads still attend to all their keys alike ({{where}}): the model "
                "hardly learns from context. With post-LN, warm up the learning rate; with any, try a lower one.",
                median=median,
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
            "uniform": dict(self._uniform.counts),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on judging."""
        self._past.values = {name: list(values) for name, values in state_dict["past"].items()}
        self._collapsing.counts = dict(state_dict["collapsing"])
        self._uniform.counts = dict(state_dict["uniform"])


def _add(a: AttentionStatistics, b: AttentionStatistics) -> AttentionStatistics:
    return AttentionStatistics(a.table + b.table, torch.maximum(a.largest, b.largest))
