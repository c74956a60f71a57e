"""Run by test_pretrained.py in two processes, and imported by it: fine-tuning in stages, and gone on with in each."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))

from helpers import make_trainer
from lit_callbacks import ExactResume, GradualUnfreezing, LossSpikeRecovery, SetupError, VerifiedCheckpoint
from lit_transformer import LitPretrained

STAGES = ["*classifier*|*pooler*", "*.layer.1.*"]
SETTINGS = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}


def samples(n=32):
    """Does a sequence have many large tokens?"""
    ids = torch.randint(5, 50, (n, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    targets = (ids[:, :6].float().mean(1) > 27).long()
    return [{"input_ids": i, "attention_mask": m, "targets": t} for i, m, t in zip(ids, mask, targets, strict=True)]


def fine_tune(model, folder, batch_size, resume=None, callbacks=(), accumulate=1, **settings):
    """Four epochs in three stages: one of the head, one with the top layer, two of everything; and what is where."""
    decaying = partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=0.1)
    torch.manual_seed(0)
    task = LitPretrained(model, "classification", num_labels=2, optimizer=decaying, schedule=None)
    for module in task.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each rank would draw its own
    unfreezing = GradualUnfreezing(STAGES, [1, 1], [1.0, 1.0, 0.5])
    checkpoint = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        max_epochs=4, enable_checkpointing=True, default_root_dir=folder, accumulate_grad_batches=accumulate,
        use_distributed_sampler=False, callbacks=[ExactResume(), unfreezing, checkpoint, *callbacks], **settings,
    )  # fmt: skip
    ranks = trainer.world_size
    own = samples()[
        int(os.environ.get("RANK", 0)) % ranks :: ranks
    ]  # in the order of the samples, on any number of ranks
    trainer.fit(task, DataLoader(own, batch_size), ckpt_path=resume)
    return task


def weights(task):
    return {name: value.tolist() for name, value in task.state_dict().items()}


def main(model, out):
    found = {"whole": weights(fine_tune(model, out / "whole", 4, **SETTINGS))}
    found["again"] = weights(fine_tune(model, out / "again", 4, callbacks=[LossSpikeRecovery()], **SETTINGS))
    for step in (2, 6, 10):
        checkpoint = str(out / "whole" / f"step={step}.ckpt")
        found[f"from {step}"] = weights(fine_tune(model, out / f"from-{step}", 4, resume=checkpoint, **SETTINGS))
    viewing = DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True)
    found["views"] = weights(fine_tune(model, out / "views", 2, accumulate=2, strategy=viewing, devices=2))
    try:
        fine_tune(model, out / "plain", 4, strategy="ddp", devices=2)
    except SetupError as error:
        found["refused"] = str(error)
    (out / f"fine_{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[1]))
