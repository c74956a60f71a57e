"""Run by test_data_grouped.py in two processes, and imported by it: what is trained on, also when resumed."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from lightning.pytorch import Callback

sys.path.append(str(Path(__file__).parents[1]))

from helpers import make_trainer
from lit_callbacks import ExactResume, VerifiedCheckpoint
from lit_transformer import ClassificationData, LanguageModelingData, LitCausalLM, LitClassifier, TransformerConfig

STEPS = 30
WAYS = ("group_by_length", "max_tokens", "blocks", "packing")


class Seen(Callback):
    """The samples of each batch."""

    def __init__(self):
        self.ids = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch["sample_ids"].tolist())


def train(files, folder, way, steps, resume=None, workers=0, **settings):
    """The samples of each step, on this rank, and how many steps an epoch has."""
    ranks = settings.get("devices", 1)
    size = {"batch_size": 8 // ranks, "num_workers": workers}
    if way == "group_by_length":
        data = ClassificationData(files=files, token_dropout=0.1, group_by_length=True, **size)
    elif way == "max_tokens":
        data = ClassificationData(files=files, token_dropout=0.1, max_tokens=400 // ranks, num_workers=workers)
    else:
        where = {"files": files.replace("a.csv", "*.txt"), "cache_dir": str(folder / "tokens")}
        data = LanguageModelingData(**where, block_size=32, packing=way == "packing", **size)
    config = TransformerConfig(d_model=16, n_layers=1, n_heads=2, max_length=256)
    torch.manual_seed(0)
    task = LitClassifier(config, num_labels=2, schedule=None) if isinstance(data, ClassificationData) else None
    task, seen = task or LitCausalLM(config, schedule=None), Seen()
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        max_steps=steps, max_epochs=-1, enable_checkpointing=True, default_root_dir=folder, limit_val_batches=0,
        callbacks=[ExactResume(), checkpoint, seen], **settings,
    )  # fmt: skip
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return seen.ids, data.batches_per_epoch(ranks)


def main(out, files):
    """Write what this rank saw, uninterrupted and resumed."""
    rank, found = int(os.environ["RANK"]), {}
    datasets.config.HF_DATASETS_CACHE = out / f"cache_{rank}"
    for way in WAYS:
        folder, both = out / way, {"strategy": "ddp", "devices": 2}
        whole, epoch = train(files, folder, way, STEPS, **both)
        places = {"middle": epoch // 2, "last": epoch - 1, "after": epoch}
        resumed = {}
        for i, (name, place) in enumerate(places.items()):
            checkpoint, workers = folder / f"step={place}.ckpt", 2 * (i == 0)
            resumed[name] = place, train(files, out / f"{way}_{name}", way, place + 4, checkpoint, workers, **both)[0]
        found[way] = {"whole": whole, "resumed": resumed}
    (out / f"data_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
