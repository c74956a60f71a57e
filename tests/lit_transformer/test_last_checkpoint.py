"""Interrupted anywhere between two steps and resumed, a run ends bit-identical to the undisturbed one."""

import signal
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_transformer import LanguageModelingData, LitCausalLM, TransformerConfig, WarmupCosine
from lit_transformer.run.last_checkpoint import LastCheckpoint

NO_DROPOUT = {"attention_dropout": 0, "ffn_dropout": 0, "residual_dropout": 0, "embedding_dropout": 0}


class CtrlC(Callback):
    """Send this process a real SIGINT at one point."""

    def __init__(self, hook, at):
        self.at, self.sent = at, False
        setattr(self, hook, self._maybe_send)

    def _maybe_send(self, trainer, *_):
        if trainer.state.stage != "sanity_check" and trainer.fit_loop.total_batch_idx == self.at and not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGINT)


class Record(Callback):
    def __init__(self):
        self.ids = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(batch["sample_ids"].tolist())


def fit(tmp_path, corpus, *callbacks, accumulate=1, workers=0, resume=False):
    torch.manual_seed(0)
    config = TransformerConfig(max_length=16, d_model=16, n_layers=1, n_heads=2, **NO_DROPOUT)
    module = LitCausalLM(config, partial(torch.optim.AdamW, lr=1e-2), WarmupCosine(0.1))
    data = LanguageModelingData(
        files=str(corpus), block_size=16, batch_size=2, num_workers=workers, cache_dir=str(tmp_path / "cache")
    )
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=12,
        val_check_interval=5,
        limit_val_batches=3,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record, *callbacks, LastCheckpoint(tmp_path / "last.ckpt")],
    )
    path = tmp_path / "last.ckpt" if resume else None
    stopped = False
    try:
        trainer.fit(module, data, ckpt_path=path, weights_only=True if resume else None)
    except SystemExit:
        stopped = True
    return module.state_dict(), record.ids, stopped, trainer.global_step


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(200)))
    return path


@pytest.mark.parametrize(
    ("hook", "at", "accumulate", "workers"),
    [
        ("on_train_batch_start", 3, 1, 0),
        ("on_train_batch_start", 3, 1, 2),
        ("on_after_backward", 7, 1, 0),
        ("on_train_batch_start", 11, 1, 0),  # the last batch of an epoch
        ("on_train_batch_start", 12, 1, 0),  # the first of the next
        ("on_train_batch_start", 4, 4, 0),  # in the middle of an accumulation window
        ("on_validation_batch_start", 4, 1, 0),  # in a validation inside the epoch
    ],
)
def test_resumed_after_ctrl_c_equals_undisturbed(tmp_path, corpus, hook, at, accumulate, workers):
    expected, expected_ids, _, expected_steps = fit(tmp_path / "a", corpus, accumulate=accumulate)
    ctrl_c = CtrlC(hook, at)
    _, first_ids, stopped, _ = fit(tmp_path / "b", corpus, ctrl_c, accumulate=accumulate, workers=workers)
    assert ctrl_c.sent
    assert stopped
    assert len(first_ids) < len(expected_ids)
    weights, rest_ids, _, steps = fit(tmp_path / "b", corpus, accumulate=accumulate, workers=workers, resume=True)
    assert first_ids + rest_ids == expected_ids
    assert steps == expected_steps
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_second_ctrl_c_stops_at_once(tmp_path, corpus):
    class Twice(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    _, ids, stopped, steps = fit(tmp_path, corpus, Twice())
    assert stopped
    assert (len(ids), steps) == (3, 2)


def test_ctrl_c_belongs_to_its_owner_again_after_fit(tmp_path, corpus):
    before = signal.getsignal(signal.SIGINT)
    fit(tmp_path, corpus)
    assert signal.getsignal(signal.SIGINT) is before
    fit(tmp_path, corpus, CtrlC("on_train_batch_start", 3))
    # Lightning ignores Ctrl-C while it shuts down, and leaves it so; ours is gone all the same.
    assert signal.getsignal(signal.SIGINT) is before


def test_last_checkpoint_holds_the_last_step(tmp_path, corpus):
    _, _, _, steps = fit(tmp_path, corpus)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps
