"""A tiny language model, data with faults in it, and a logger that remembers: what the tests of both packages share."""

import copy
import json
import logging
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import lightning.pytorch
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 32


class TinyBlock(nn.Module):
    """Causal self-attention with two heads, around a residual stream."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.Linear(width, 3 * width, bias=False)  # a key's bias has no gradient but noise

    def forward(self, x):
        q, k, v = self.attention(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


class TinyLMBody:
    """The LightningModule's methods; `TinyLM` and `OldTinyLM` give it the base class of either package."""

    def __init__(self, dropout=0.0, batch_norm=False, lr=0.01, optimizer=torch.optim.AdamW, **options):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(TinyBlock(16) for _ in range(2))
        self.hidden = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, VOCABULARY)
        self.optimizer_class, self.optimizer_options = optimizer, {"lr": lr, **options}

    def loss(self, batch):
        tokens = batch["tokens"]
        stream = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            stream = block(stream)
        hidden = self.norm(self.hidden(stream).flatten(0, 1))
        logits = self.head(self.dropout(F.gelu(hidden)))
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten()) * batch["loss_factor"].mean()
        if batch["bad_gradient"].any():  # 0 * sqrt'(0): the value is 0, the gradient NaN
            loss = loss + (0 * self.hidden.weight).sum().sqrt()
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def make_optimizer(self, parameters):
        return self.optimizer_class(parameters, **self.optimizer_options)


class TinyLM(TinyLMBody, lightning.pytorch.LightningModule):
    """For `lightning.pytorch`."""


class OldTinyLM(TinyLMBody, pytorch_lightning.LightningModule):
    """For `pytorch_lightning`."""


class TwoOptimizers(TinyLM):
    """Manual optimization: the head has an optimizer of its own, and both step on every batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        body = [*self.embedding.parameters(), *self.blocks.parameters(), *self.hidden.parameters()]
        return [self.make_optimizer(body), self.make_optimizer(self.head.parameters())]


class Tokens(Dataset):
    """Random sequences, the same ones every time. `faults` maps a sample to what is wrong with it."""

    def __init__(self, n_samples=64, faults=None):
        self.tokens = torch.randint(VOCABULARY, (n_samples, 9), generator=torch.Generator().manual_seed(1))
        self.faults = faults or {}

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        fault = self.faults.get(index)
        return {
            "tokens": self.tokens[index],
            "index": index,
            "loss_factor": {"nan": math.nan, "inf": math.inf, "spike": 50.0}.get(fault, 1.0),
            "bad_gradient": fault == "gradient",
        }


def loader(faults=None, batch_size=4, n_samples=64, without=()):
    """Batches in order, `without` some of them."""
    data = Tokens(n_samples, faults)
    batches = [list(range(i, i + batch_size)) for i in range(0, n_samples, batch_size)]
    return DataLoader(data, batch_sampler=[batch for i, batch in enumerate(batches) if i not in without])


class TokensWithIds(lightning.pytorch.LightningDataModule):
    """A data module that offers `sample_ids`."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def train_dataloader(self):
        return loader(**self.options)

    def sample_ids(self, batch):
        return batch["index"].tolist()


class MemoryLogger(lightning.pytorch.loggers.Logger):
    """Remembers every call of `log_metrics` as (step, metrics)."""

    name, version, save_dir = "memory", 0, None

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def values(self, key):
        return {step: metrics[key] for step, metrics in self.calls if key in metrics}


@contextmanager
def says(pattern):
    """The lines that our callbacks put on the console inside, one of which must match."""
    handler, lines = logging.Handler(), []
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.lit_callbacks")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
    assert any(re.search(pattern, line) for line in lines), lines


def make_trainer(package=lightning.pytorch, **options):
    """A quiet CPU trainer of either package, without logger and checkpoints unless asked for."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return package.Trainer(**{"accelerator": "cpu", "logger": False, "log_every_n_steps": 1, **quiet, **options})


def snapshot(module, trainer):
    """Everything training has changed: weights, buffers and optimizer states."""
    return copy.deepcopy([module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]])


def assert_identical(actual, expected):
    """Equal to the last bit."""
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for a, b in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
        assert a["param_groups"] == b["param_groups"]


def two_ranks(worker, out, name, *arguments, timeout=240):
    """What two gloo processes of a script found, each in ``<name>_<rank>.json`` of the folder it is given."""
    return run_ranks(worker, out, name, *arguments, timeout=timeout)


def run_ranks(worker, out, name, *arguments, n=2, timeout=240):
    """Likewise, of another number."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [*command, worker, out, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    found = [out / f"{name}_{rank}.json" for rank in range(n)]
    assert all(path.exists() for path in found), run.stderr[-4000:]
    return [json.loads(path.read_text()) for path in found]
