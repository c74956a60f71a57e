"""Token ids of tables: the same as without a cache, made once, mapped from then on."""

import csv
from pathlib import Path

import numpy as np
import pytest

from lit_transformer.data import ClassificationData, SequencePairData
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.tables import token_cache
from lit_transformer.data.tables.token_cache import encoded_once

TEXTS = [f"text {i} " * (i % 7 + 1) for i in range(50)]


@pytest.fixture
def files(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "ab"[i % 2]) for i, text in enumerate(TEXTS))])
    return {"files": str(tmp_path / "a.csv"), "cache_dir": str(tmp_path / "cache"), "max_length": 16}


def test_they_are_those_of_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_AT_ONCE", 7)  # of fifty
    encoder = Encoder("bytes", max_length=16)
    found, lengths = encoded_once(encoder, TEXTS, "bytes", str(tmp_path))
    rows, expected = encoder(TEXTS)
    assert [row.tolist() for row in map(found.__getitem__, range(len(found)))] == rows
    assert lengths.tolist() == expected.tolist()
    assert found.digest() == Ragged(rows).digest()  # which checkpoints have
    assert isinstance(found._tokens.base, np.memmap)
    assert found.take(np.arange(50)) is found
    assert found.take(np.array([3, 1]))[1].tolist() == rows[1]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [(ClassificationData, {}), (SequencePairData, {"source_column": "text", "target_column": "label"})],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_second_start_encodes_nothing(kind, columns, tokenizer, files, monkeypatch):
    settings = {"tokenizer": tokenizer, "bpe_vocab_size": 280, **columns, **files}
    first = kind(**settings)
    first.setup()
    for name in ("__call__", "ended"):
        monkeypatch.setattr(Encoder, name, lambda *_, **__: pytest.fail("it encodes again"))
    second = kind(**settings)
    second.setup()
    assert second.state_dict() == first.state_dict()
    assert len(list(Path(files["cache_dir"]).iterdir())) == 3 * (1 if kind is ClassificationData else 2)
    with pytest.raises(pytest.fail.Exception, match="it encodes again"):
        kind(**settings | {"max_length": 15}).setup()


def test_other_texts_are_encoded(files):
    first = ClassificationData(**files)
    first.setup()
    path = Path(files["files"])
    path.write_text(path.read_text().replace("text 3 ", "test 3 "))
    second = ClassificationData(**files)
    second.setup()
    assert second.fingerprint()["digest"] != first.fingerprint()["digest"]
