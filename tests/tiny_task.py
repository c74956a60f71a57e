"""A language model of a few weights, its data and a quiet trainer."""

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lit_transformer import TransformerConfig

TINY = TransformerConfig(vocab_size=11, max_length=8, d_model=16, n_layers=2, n_heads=2)


class Blocks(LightningDataModule):
    """A few fixed batches of random ids."""

    block_size = 8

    def __init__(self, batches=6, batch_size=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(11, (batches * batch_size, 9), generator=generator)
        self.samples = [{"input_ids": row[:-1], "targets": row[1:]} for row in ids]
        self.batch_size = batch_size
        self.tokens_per_batch = batch_size * 8
        self.token_bytes = torch.arange(11)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.samples[:7], batch_size=3)  # batches of 3, 3 and 1

    test_dataloader = predict_dataloader = val_dataloader


def trainer(tmp_path, **settings):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **({"max_epochs": 1} | quiet | settings))
