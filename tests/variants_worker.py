"""Run by test_variants.py in two processes, and imported by it: activation checkpointing and torch.compile."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from helpers import make_trainer
from lit_transformer import LanguageModelingData, LitCausalLM
from lit_transformer.errors import UsageError
from strategy_worker import CONFIG, STRATEGIES, Losses, as_on_the_command_line

VARIANTS = ("checkpointed", "compiled")


def losses(folder, text, strategy, checkpointing=0, compiled=False):
    """Of each step of a short run."""
    devices, parts, make_strategy = STRATEGIES[strategy]
    torch.manual_seed(0)
    config = replace(CONFIG, activation_checkpointing=checkpointing)
    with as_on_the_command_line(strategy):
        task = LitCausalLM(config, partial(torch.optim.AdamW, lr=3e-3), schedule=None, compile_model=compiled)
    data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), block_size=16, batch_size=8 // parts)
    seen = Losses()
    make_trainer(
        strategy=make_strategy(),
        devices=devices,
        max_steps=5,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[seen],
    ).fit(task, data)
    return {str(step): sum(values) for step, values in seen.found.items()}


def main(out, strategy, text):
    """Write what each variant gives on this rank, and how many graphs torch made."""
    found = {"checkpointed": losses(out / "checkpointed", text, strategy, checkpointing=1), "refused": ""}
    alone = strategy == "tensor_parallel"
    if strategy in ("tensor_parallel", "zero3"):
        try:
            losses(out / "refused", text, strategy, checkpointing=1, compiled=True)
        except UsageError as error:
            found["refused"] = str(error)
    if strategy != "zero3":
        found["compiled"] = losses(out / "compiled", text, strategy, checkpointing=0 if alone else 1, compiled=True)
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    (out / f"{strategy}_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
