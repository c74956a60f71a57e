"""Run by test_deferred.py in two processes: what a model takes on each while it is made, and what becomes of it."""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from helpers import make_trainer
from lit_transformer import LitCausalLM, TransformerConfig
from lit_transformer.strategies.deferred import deferred_weights
from strategy_worker import STRATEGIES, weights
from tiny_task import Blocks

SHAPE = {"vocab_size": 11, "max_length": 8, "n_heads": 2, "positions": "rotary", "attention_dropout": 0}
SHAPE |= {"ffn_dropout": 0, "residual_dropout": 0, "embedding_dropout": 0}
SMALL = TransformerConfig(**SHAPE, d_model=16, n_layers=2)
LARGE = TransformerConfig(**SHAPE, d_model=512, n_layers=8)


def mib(what):
    """Of this process, in memory now (``VmRSS``), or at most since :func:`forget_peak` (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Measured(LitCausalLM):
    """Looks at memory when the strategy has the model, and there is no optimizer yet."""

    def configure_optimizers(self):
        self.peak = mib("VmHWM")
        return super().configure_optimizers()


def fit(folder, strategy, config, deferred, **options):
    """MiB that a model adds at most until it is made, and has as a whole; and what training makes of it."""
    torch.manual_seed(0)
    forget_peak()
    before = mib("VmRSS")
    with deferred_weights() if deferred else nullcontext():
        task = Measured(config, partial(torch.optim.SGD, lr=0.1), schedule=None)
    whole = sum(parameter.numel() * 4 / 2**20 for parameter in task.parameters())
    without = all(parameter.is_meta for parameter in task.parameters())
    trainer = make_trainer(strategy=STRATEGIES[strategy][2](), devices=2, default_root_dir=folder, **options)
    trainer.fit(task, Blocks())
    trained = weights(trainer, task) | {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"without": without, "whole": whole, "peak": task.peak - before, "trained": trained}


def main(out, *strategies):
    """Write what a rank has found, of a model that was made in parts and of one that was made whole."""
    found = {}
    for strategy in strategies:
        # The small one comes first: it imports and connects what is needed once.
        half, large = {"max_epochs": 1, "precision": "bf16-true"}, {"max_steps": 1, "limit_val_batches": 0}
        found[strategy] = {
            name: {way: fit(out, strategy, config, way == "parts", **options) for way in ("parts", "whole")}
            for name, config, options in (("half", SMALL, half), ("large", LARGE, large))
        }
    (out / f"deferred_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
