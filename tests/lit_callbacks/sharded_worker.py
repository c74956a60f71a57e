"""Run by test_reliability_ddp.py in two processes: a sharded checkpoint, which is a folder, under FSDP2."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from helpers import make_trainer
from lit_callbacks import CheckpointError, VerifiedCheckpoint
from lit_callbacks.checkpointing import newest_checkpoint

RANK = int(os.environ.get("RANK", 0))


class Sharded(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(folder, steps, resume=None):
    torch.manual_seed(0)
    trainer = make_trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), devices=2, max_steps=steps,
        enable_checkpointing=True, default_root_dir=folder,
        callbacks=[VerifiedCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(Sharded(), DataLoader(TensorDataset(torch.randn(256, 8)), 8), ckpt_path=resume)
    return trainer.global_step


def main(out):
    fit(out, 12)
    torch.distributed.barrier()
    found = {"files": sorted(newest_checkpoint([out]).manifest.files)}
    if RANK == 0:
        shard = next((out / "step=12.ckpt").glob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    torch.distributed.barrier()
    try:
        fit(out, 14, str(out / "step=12.ckpt"))
    except CheckpointError as error:
        found["refused"] = str(error)
    found["resumed"] = fit(out, 14, "last")
    found["newest"] = newest_checkpoint([out]).manifest.step
    (out / f"sharded_{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
