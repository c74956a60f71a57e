"""What is hidden: as often and as BERT does, anew each time, and the same again on a resume."""

import numpy as np
import pytest
import torch

from lit_transformer import MaskedLanguageModelingData
from lit_transformer.data.batching.order import noise
from lit_transformer.errors import UsageError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(chr(97 + (i * i) % 26) for i in range(20_000)))
    return path


def ready(text, tmp_path, **options):
    data = MaskedLanguageModelingData(
        files=str(text), **{"block_size": 100, "batch_size": 8, "cache_dir": str(tmp_path), **options}
    )
    data.prepare_data()
    data.setup()
    return data


def read(loader, n):
    return [batch for _, batch in zip(range(n), loader, strict=False)]


def test_noise_is_uniform_and_independent_between_places_and_draws():
    bits = noise(3, np.arange(200), 500)
    share = (bits < np.uint64(2**62)).mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / bits.size) ** 0.5
    values = bits.astype(np.float64) / 2**64
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.02


def test_it_hides_as_often_and_as_bert_does(text, tmp_path):
    data = ready(text, tmp_path)
    assert (data.mask_id, data.vocab_size, len(data.token_bytes)) == (256, 257, 257)
    loader = data.train_dataloader()
    batches = [batch for _ in range(20) for batch in loader]
    seen, targets = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "targets"))
    chosen, n = targets != -100, targets.numel()
    assert abs(chosen.float().mean() - 0.15) < 4 * (0.15 * 0.85 / n) ** 0.5
    hidden = seen[chosen] == 256
    kept = seen[chosen] == targets[chosen]
    count = int(chosen.sum())
    assert abs(hidden.float().mean() - 0.8) < 4 * (0.16 / count) ** 0.5
    assert abs(kept.float().mean() - (0.1 + 0.1 / 256)) < 4 * (0.09 / count) ** 0.5
    others = seen[chosen][~hidden & ~kept]
    assert len(others.unique()) > 200  # any byte, not only letters
    original = torch.stack([data._splits["train"].__getitems__(batch["sample_ids"].numpy())["input_ids"]
                            for batch in batches if len(batch["sample_ids"]) == 8]).flatten(0, 1)  # fmt: skip
    assert torch.equal(seen[~chosen], original[~chosen])
    assert torch.equal(targets[chosen], original[chosen])


def test_each_epoch_hides_others_and_evaluation_always_the_same(text, tmp_path):
    data = ready(text, tmp_path)
    loader = data.train_dataloader()
    epochs = [{int(i): row for b in loader for i, row in zip(b["sample_ids"], b["targets"], strict=True)} for _ in "ab"]
    both = epochs[0].keys() & epochs[1].keys()
    assert len(both) > 100
    assert not any(torch.equal(epochs[0][i], epochs[1][i]) for i in both)
    first, second = (torch.cat([batch["input_ids"] for batch in data.val_dataloader()]) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_hides_the_same_on_any_number_of_ranks(text, tmp_path, workers):
    whole = read(ready(text, tmp_path, num_workers=workers).train_dataloader(), 6)
    data = ready(text, tmp_path)
    read(data.train_dataloader(), 3)
    state = data.state_dict()
    again = ready(text, tmp_path, batch_size=4, num_workers=workers)
    again.load_state_dict(state)
    rest = read(again.train_dataloader(), 6)
    assert state["position"] == 24
    found, expected = (torch.cat([batch["input_ids"] for batch in some]) for some in (rest, whole[3:]))
    assert torch.equal(found, expected)
    with pytest.raises(UsageError, match=r"place in the data is for mask_fraction=0\.15"):
        ready(text, tmp_path, mask_fraction=0.3).load_state_dict(state)


def test_out_of_range(text):
    with pytest.raises(UsageError, match="mask_fraction must be above 0 and below 1, got 1"):
        MaskedLanguageModelingData(mask_fraction=1.0, files=str(text))
