"""Packing: by hand, against a plain best fit, each target once, and what a document says by itself."""

import pickle
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_transformer import LitCausalLM, LitMaskedLM, TransformerConfig
from lit_transformer.data import LanguageModelingData, MaskedLanguageModelingData
from lit_transformer.data.batching.packed import PackedBlocks, pack
from lit_transformer.errors import UsageError
from lit_transformer.nn import Encoder, MaskedTransformer, Transformer
from tiny_task import trainer

RNG = np.random.default_rng(0)


def plain_best_fit(lengths, size):
    """The rule in its words, a look at every block for every piece."""
    blocks, rooms = [], []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [room for room in rooms if room >= lengths[piece]]
        if fits:
            block = rooms.index(min(fits))
            blocks[block].append(piece)
            rooms[block] -= lengths[piece]
        else:
            blocks.append([piece])
            rooms.append(size - lengths[piece])
    return blocks


def test_pack_by_hand():
    assert pack(np.array([8]), 8) == [[0]]
    assert pack(np.array([5, 5, 3, 3, 2]), 8) == [[0, 3], [1, 2], [4]]
    assert pack(np.array([], dtype=np.int64), 8) == []


@pytest.mark.parametrize(("median", "sigma", "size"), [(22, 0.6, 128), (180, 0.9, 1024), (60, 0.5, 2048)])
def test_pack_is_best_fit_and_leaves_below_a_percent(median, sigma, size):
    lengths = np.clip(RNG.lognormal(np.log(median), sigma, 3000), 1, size).astype(np.int64)
    blocks = pack(lengths, size)
    assert sorted(piece for block in blocks for piece in block) == list(range(3000))
    filled = [int(lengths[block].sum()) for block in blocks]
    assert max(filled) <= size
    # Which of several blocks with as much room is taken is left open: the number of blocks may differ a little.
    assert abs(len(blocks) - len(plain_best_fit(lengths.tolist(), size))) <= 1
    assert 1 - lengths.sum() / (len(blocks) * size) < 0.01


@pytest.fixture
def tokens(tmp_path):
    """Documents of 5, 12, 1, 3 and 4 tokens, each ended by 0."""
    documents = [[*range(10 * i + 1, 10 * i + n), 0] for i, n in enumerate([5, 12, 1, 3, 4], start=1)]
    np.save(tmp_path / "train.npy", np.array([i for ids in documents for i in ids], dtype=np.uint16))
    np.save(tmp_path / "train.documents.npy", np.cumsum([0, *map(len, documents)]))
    return tmp_path / "train.npy"


def test_blocks_by_hand(tokens):
    blocks = PackedBlocks(tokens, 8)  # inputs of 4, 8 + 3, 0, 2 and 3
    assert len(blocks) == 3
    batch = blocks.__getitems__(np.array([0, 2, 1]))
    assert batch["input_ids"].tolist() == [
        [21, 22, 23, 24, 25, 26, 27, 28],
        [51, 52, 53, 41, 42, 0, 0, 0],
        [11, 12, 13, 14, 29, 30, 31, 0],
    ]
    assert batch["targets"].tolist() == [
        [22, 23, 24, 25, 26, 27, 28, 29],
        [52, 53, 0, 42, 0, -100, -100, -100],
        [12, 13, 14, 0, 30, 31, 0, -100],
    ]
    assert batch["document_ids"].tolist() == [[0] * 8, [0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 2]]
    assert batch["sample_ids"].tolist() == [0, 2, 1]
    assert blocks.filled == 20 / 24
    again = pickle.loads(pickle.dumps(blocks)).__getitems__(np.array([0, 2, 1]))
    assert all(torch.equal(again[name], batch[name]) for name in batch)


LENGTHS = RNG.integers(1, 70, 60).tolist()
TEXTS = {f"{i}.txt": "".join(chr(97 + (i * j) % 26) for j in range(n)) for i, n in enumerate(LENGTHS)}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "text" / name).write_text(text)
    return {"files": str(tmp_path / "text" / "*.txt"), "cache_dir": str(tmp_path / "cache"), "batch_size": 3}


def ready(files, kind=LanguageModelingData, **settings):
    data = kind(**files, **{"block_size": 32, "packing": True} | settings)
    data.prepare_data()
    data.setup()
    return data


TINY = TransformerConfig(
    vocab_size=257, max_length=32, d_model=16, n_layers=2, n_heads=4,
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip
CHOICES = [
    {},
    {"positions": "rotary", "n_kv_heads": 2},
    {"positions": "rotary", "qk_norm": True},
    {"positions": "sinusoidal"},
    {"positions": "none", "norm_placement": "post"},
    {"sliding_window": 3},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("kind", [Transformer, Encoder, MaskedTransformer])
def test_a_document_says_what_it_says_alone_and_learns_the_same(kind, choices):
    torch.manual_seed(0)
    model = kind(replace(TINY, **choices))
    lengths = [5, 1, 9, 2]
    rows = torch.randint(256, (2, sum(lengths)))
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    model(rows, None, number).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(part) for part in rows.split(lengths, dim=1)]
    torch.testing.assert_close(model(rows, None, number), torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    sum(out.square().sum() for out in alone).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, packed[name], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(rows), model(rows, None, number), atol=1e-3)  # else they would see each other


def test_one_graph():
    model = Transformer(replace(TINY, positions="rotary")).eval()
    ids, number = torch.randint(256, (2, 12)), torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, None, number), model(ids, None, number))


def test_packed_loss_is_the_loss_of_the_documents(files):
    data, task = ready(files, val_files=files["files"].replace("*", "1*")), LitCausalLM(TINY, schedule=None)
    total = count = 0.0
    for batch in data.val_dataloader():
        n = int((batch["targets"] != -100).sum())
        total, count = total + task.training_loss(batch).detach() * n, count + n
    losses, n = 0.0, 0
    for text in (text for name, text in TEXTS.items() if name[0] == "1"):
        ids = torch.tensor([[*text.encode(), data.tokenizer.eos_id]])
        for start in range(0, ids.size(1) - 1, 32):
            seen, wanted = ids[:, start : start + 32], ids[:, start + 1 : start + 33]
            logits = task.model(seen[:, : wanted.size(1)])
            loss = F.cross_entropy(logits[0], wanted[0], reduction="sum").detach()
            losses, n = losses + loss, n + wanted.size(1)
    assert n == count
    assert float(total / count) == pytest.approx(float(losses / n), rel=1e-6)


def take(data, count):
    found = []
    while len(found) < count:
        found += [batch["sample_ids"].tolist() for batch in islice(data.train_dataloader(), count - len(found))]
    return found


@pytest.mark.parametrize("kind", [LanguageModelingData, MaskedLanguageModelingData])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [2, "last", "end"])
def test_it_goes_on_from_any_place_without_what_is_excluded(files, kind, packing, workers, done):
    settings = {"kind": kind, "packing": packing, "num_workers": workers}
    count = ready(files, **settings).batches_per_epoch()
    made = {"last": count - 1, "end": count}.get(done, done)
    whole = take(ready(files, **settings), count + 4)
    first, second = ready(files, **settings), ready(files, **settings)
    assert take(first, made) == whole[:made]
    first.exclude(whole[0])
    second.load_state_dict(first.state_dict())
    left = [i for batch in whole[made:] for i in batch if i not in whole[0]]
    again = [i for batch in take(second, 4) for i in batch]
    assert again[: len(left)] == left[: len(again)]
    assert not set(again) & set(whole[0])


def test_masks_hide_text_alone(files):
    settings, empty = {"block_size": 24}, 0
    data = ready(files, MaskedLanguageModelingData, mask_fraction=0.5, **settings)
    plain = ready(files, **settings)
    for hidden, batch in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        nothing = batch["targets"] == -100
        empty += int(nothing.sum())
        assert (hidden["targets"][nothing] == -100).all()
        assert torch.equal(hidden["input_ids"][nothing], batch["input_ids"][nothing])
        assert torch.equal(hidden["document_ids"], batch["document_ids"])
    assert empty > 0
    share = [float((batch["targets"] != -100).sum()) for batch in data.train_dataloader()]
    room = [float((batch["targets"] != -100).sum()) for batch in plain.train_dataloader()]
    assert sum(share) / sum(room) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("task", "kind"), [(LitCausalLM, None), (LitMaskedLM, MaskedLanguageModelingData)])
def test_it_trains(files, tmp_path, task, kind):
    data = ready(files, kind or LanguageModelingData)
    module, run = task(TINY, partial(torch.optim.AdamW, lr=1e-2), None), trainer(tmp_path, max_steps=40)
    before = run.validate(module, data, verbose=False)[0]["val/loss"]
    run.fit(module, data)
    assert run.validate(module, data, verbose=False)[0]["val/loss"] < 0.8 * before
    assert "blocks of 32 of whole documents, 9" in data.describe()


def test_another_way_to_make_blocks_is_another_place(files):
    packed, plain = ready(files), ready(files, packing=False)
    with pytest.raises(UsageError, match="packing=True, this data module has packing=False"):
        plain.load_state_dict(packed.state_dict())
    of_before = plain.state_dict()
    del of_before["packing"]
    ready(files, packing=False).load_state_dict(of_before)
    with pytest.raises(UsageError, match="packing=False, this data module has packing=True"):
        packed.load_state_dict(of_before)
