"""Tokens left out in training: the right share, others each time, the same on a resume, none in evaluation."""

import csv
from itertools import islice

import numpy as np
import pytest
import torch

from lit_transformer import ClassificationData, SequencePairData
from lit_transformer.data.batching.token_dropout import drop_tokens
from lit_transformer.errors import UsageError


def test_what_is_left_is_in_order_and_to_the_left():
    lengths = torch.tensor([500, 300, 2, 1] * 100)
    mask = (torch.arange(500) < lengths[:, None]).long()
    ids = torch.arange(1, 501) * mask
    found = drop_tokens({"input_ids": ids, "attention_mask": mask}, np.arange(400), 0.2, seed=1, pad_id=7)
    kept = torch.zeros(400, 500)
    for i, (row, real) in enumerate(zip(found["input_ids"], found["attention_mask"].bool(), strict=True)):
        n = int(real.sum())
        assert real[:n].all()
        assert (row[n:] == 7).all()
        left = row[:n].tolist()
        assert left == sorted(set(left))
        assert (left[0], left[-1]) == (1, int(lengths[i]))
        kept[i, row[:n] - 1] = 1
    inner = kept[0::4, 1:499]
    assert abs(inner.mean() - 0.8) < 4 * (0.16 / inner.numel()) ** 0.5
    assert (inner.mean(1) - 0.8).abs().max() < 6 * (0.16 / 498) ** 0.5
    assert (inner.mean(0) - 0.8).abs().max() < 6 * (0.16 / 100) ** 0.5
    assert found["attention_mask"].shape[1] == kept.sum(1).max() < 500


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

    def tokens(batches):
        return {
            int(i): row[row != 0].tolist()
            for b in batches
            for i, row in zip(b["sample_ids"], b["input_ids"], strict=True)
        }

    data = ready()
    first, second = (tokens(data.train_dataloader()) for _ in range(2))
    common = first.keys() & second.keys()
    assert sum(first[i] == second[i] for i in common) < 0.1 * len(common)
    texts = tokens(ready(token_dropout=0.0).val_dataloader())
    assert tokens(data.val_dataloader()) == texts
    assert min(map(len, texts.values())) > max(map(len, first.values()))
    whole = ready()
    expected = tokens(islice(whole.train_dataloader(), 4, 6))
    part = ready()
    list(islice(part.train_dataloader(), 4))
    again = ready()
    again.load_state_dict(part.state_dict())
    assert tokens(islice(again.train_dataloader(), 2)) == expected
    with pytest.raises(UsageError, match=r"place in the data is for token_dropout=0\.4"):
        ready(token_dropout=0.1).load_state_dict(part.state_dict())
    with pytest.raises(UsageError, match="token_dropout must be at least 0 and below 1, got 1"):
        ready(token_dropout=1.0)
