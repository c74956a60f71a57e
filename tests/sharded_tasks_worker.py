"""Run by test_sharded_tasks.py in two processes, and imported by it: what trains under FSDP2 beside the recipe."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from pytorch_optimizer import ScheduleFreeAdamW
from torch.utils.data import DataLoader

from helpers import make_trainer
from lit_callbacks import (
    EarlyStoppingWithRestore,
    ExactResume,
    GradualUnfreezing,
    LossSpikeRecovery,
    VerifiedCheckpoint,
)
from lit_transformer import (
    LanguageModelingData,
    LitCausalLM,
    LitPretrained,
    LitSeq2Seq,
    TransformerConfig,
    WarmupConstant,
)
from strategy_worker import Losses, weights

EPOCH = 4
CONFIG = TransformerConfig(
    vocab_size=256, max_length=16, d_model=16, n_layers=2, n_heads=2, bias=False,  # of a key: noise
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip
ADAMW = partial(torch.optim.AdamW, lr=3e-3)
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"vocab_size": 256, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STAGES = ["*final_norm*|*blocks.1.feed_forward*", "*blocks.1*"]


class Pairs(LightningDataModule):
    """Random sources, and as targets their first half backwards."""

    vocab_size = 256

    def __init__(self, batch_size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sources = torch.randint(1, 20, (16, 8), generator=generator)
        self.samples = [{"input_ids": row, "targets": torch.cat((row[:4].flip(0), row[:1] * 0))} for row in sources]
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.samples[self.trainer.global_rank :: self.trainer.world_size], self.batch_size)

    val_dataloader = train_dataloader


CASES = {
    "hugging_face": (lambda: LitPretrained(architecture=GPT2, optimizer=ADAMW, schedule=None), list),
    "unfreezing": (lambda: LitCausalLM(CONFIG, ADAMW, None), lambda: [GradualUnfreezing(STAGES, epochs=[1, 1])]),
    "early_stopping": (
        lambda: LitCausalLM(CONFIG, ADAMW, None),
        lambda: [EarlyStoppingWithRestore("val/accuracy", 1, "min")],
    ),
    "schedule_free": (lambda: LitCausalLM(CONFIG, partial(ScheduleFreeAdamW, lr=3e-3), WarmupConstant(warmup=2)), list),
    "texts": (lambda: LitSeq2Seq(CONFIG, optimizer=ADAMW, schedule=None, max_new_tokens=5), list),
}


def fit(case, folder, text, strategy, steps=3 * EPOCH, resume=None):
    """Losses, validations and weights of a run whose epochs have four steps, each ended by a validation."""
    devices = 1 if strategy == "single" else 2
    make, callbacks = CASES[case]
    torch.manual_seed(0)
    task, losses = make(), Losses()
    sizes = {"block_size": 16, "batch_size": 8 // devices}
    data = Pairs(8 // devices)
    if case != "texts":
        data = LanguageModelingData(files=text, cache_dir=str(folder / "cache"), **sizes)
    trainer = make_trainer(
        strategy="auto" if strategy == "single" else strategy, devices=devices, max_steps=steps, max_epochs=-1,
        limit_train_batches=EPOCH, limit_val_batches=2, num_sanity_val_steps=0, use_distributed_sampler=False,
        enable_checkpointing=True, default_root_dir=folder,
        callbacks=[
            losses, *callbacks(), ExactResume(), LossSpikeRecovery(snapshot_every_n_steps=5),
            VerifiedCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1),
        ],
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path=resume)
    return {
        "losses": {str(step): sum(values) for step, values in losses.found.items()},
        "validation": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "weights": weights(trainer, task),
        "step": trainer.global_step,
    }


def main(out, text, plain):
    """Write what each case gives on this rank, and what runs give that go on from parts and from one file."""
    found = {case: fit(case, out / case, text, "fsdp2") for case in CASES}
    for case in ("hugging_face", "unfreezing", "schedule_free"):
        found[f"{case} resumed"] = fit(case, out / "resumed", text, "fsdp2", resume=str(out / case / "step=6.ckpt"))
    found["plain resumed"] = fit("hugging_face", out / "plain", text, "fsdp2", resume=plain)
    (out / f"fsdp2_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
