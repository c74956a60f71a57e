"""Tokens left out in training: the right share, others each time, the same on a resume, none in evaluation."""

import csv
from itertools import islice

import numpy as np
import pytest
import torch

from lit_transformer import ClassificationData, SequencePairData
from lit_transformer.data.token_dropout import drop_tokens
from lit_transformer.errors import UsageError


def test_the_share_that_is_dropped():
    mask = torch.ones(400, 500, dtype=torch.int64)
    mask[:, 400:] = 0  # padding stays hidden
    dropped = drop_tokens({"attention_mask": mask}, np.arange(400), 0.2, seed=1)["attention_mask"]
    assert dropped.dtype == torch.int64
    assert dropped[:, 0].all()
    assert not dropped[:, 400:].any()
    kept = dropped[:, 1:400].double()
    assert abs(kept.mean() - 0.8) < 4 * (0.16 / kept.numel()) ** 0.5
    assert (kept.mean(1) - 0.8).abs().max() < 6 * (0.16 / 399) ** 0.5
    assert (kept.mean(0) - 0.8).abs().max() < 6 * (0.16 / 400) ** 0.5


@pytest.mark.parametrize("kind", [ClassificationData, SequencePairData])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_another_choice_each_time_and_resumed(kind, workers, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((f"word{i} " * 9, "ab"[i % 2]) for i in range(60))])
    columns = {} if kind is ClassificationData else {"source_column": "text", "target_column": "label"}

    def ready(**options):
        settings = {"token_dropout": 0.4, "batch_size": 8, "num_workers": workers} | columns | options
        data = kind(files=str(tmp_path / "a.csv"), **settings)
        data.setup()
        return data

    def masks(batches):
        return {
            int(i): row.tolist() for b in batches for i, row in zip(b["sample_ids"], b["attention_mask"], strict=True)
        }

    data = ready()
    first, second = (masks(data.train_dataloader()) for _ in range(2))
    common = first.keys() & second.keys()
    assert sum(first[i] == second[i] for i in common) < 0.1 * len(common)
    for batch in data.val_dataloader():
        assert batch["attention_mask"].sum() == (batch["attention_mask"] * 0 + 1)[batch["input_ids"] != 0].sum()
    whole = ready()
    expected = masks(islice(whole.train_dataloader(), 4, 6))
    part = ready()
    list(islice(part.train_dataloader(), 4))
    again = ready()
    again.load_state_dict(part.state_dict())
    assert masks(islice(again.train_dataloader(), 2)) == expected
    with pytest.raises(UsageError, match=r"place in the data is for token_dropout=0\.4"):
        ready(token_dropout=0.1).load_state_dict(part.state_dict())
    with pytest.raises(UsageError, match="token_dropout must be at least 0 and below 1, got 1"):
        ready(token_dropout=1.0)
