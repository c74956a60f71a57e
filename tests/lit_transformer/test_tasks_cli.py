"""The tasks from the command line: what is printed, predicted, written and exported."""

import csv

import pytest
import torch
import transformers as hf

from lit_transformer.cli import main

SMALL = "--model.init_args.config.d_model=16 --model.init_args.config.n_heads=2 --model.init_args.config.n_layers=1"
FAST = "--trainer.max_steps=4 --trainer.log_every_n_steps=1 --trainer.enable_progress_bar=false --run=a"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(words):
        main(words.split())
        return capsys.readouterr().out

    return run


def fit(cli, config, more):
    return cli(f"fit --config {config} {FAST} {SMALL} --model.init_args.schedule=null {more}")


def write_text(path):
    path.write_text("".join(f"the {i}th line of a text, which is long enough\n" for i in range(2000)))


def write_table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_sequence_to_sequence(cli, tmp_path):
    write_table(tmp_path / "pairs.csv", ("source", "target"), [(f"word {i % 9}", f"{i % 9} drow") for i in range(80)])
    sizes = "--data.init_args.tokenizer=bytes --data.init_args.batch_size=8 --trainer.val_check_interval=4"
    out = fit(cli, "seq2seq", f"--data.init_args.files=pairs.csv {sizes}")
    assert "LitSeq2Seq" in out
    assert "1 + 1 layers x 16" in out
    assert "; guessing tokens by their frequency: " in out
    assert "; always '" in out
    assert "The first 4 targets of the validation data, and what the model writes:" in out
    assert out.count(" drow\n") >= 4
    assert "val/bleu" in cli("validate --run a --ckpt_path last")
    cli("predict --run a --ckpt_path last")
    written = (tmp_path / "runs" / "a" / "predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(written.splitlines()))
    assert len(rows) == 4
    assert rows[0].keys() == {"sample_ids", "loss", "text"}
    assert cli("generate --run a --prompt word").endswith("\n")
    with pytest.raises(SystemExit) as stop:
        cli("export --run a --to theirs --hugging_face true")
    assert stop.value.code == 2


def test_a_masked_model_is_exported_as_bert(cli, tmp_path):
    write_text(tmp_path / "text.txt")
    like = "--model.init_args.config.norm_placement=post --model.init_args.config.positions=learned "
    like += "--model.init_args.config.embedding_norm=true --model.init_args.config.init=gpt2 "
    like += "--model.init_args.config.qk_norm=false --trainer.limit_val_batches=1"
    data = "--data.init_args.files=text.txt --data.init_args.cache_dir=cache --trainer.val_check_interval=4"
    out = fit(cli, "masked_lm", f"{like} {data}")
    assert "15 % of the tokens are to be guessed" in out
    assert "; guessing tokens by their frequency: " in out
    assert cli("export --run a --to theirs --hugging_face true").endswith("theirs: config.json, model.safetensors\n")
    model = hf.AutoModelForMaskedLM.from_pretrained("theirs")
    assert model.config.vocab_size == 257
    with pytest.raises(SystemExit):
        cli("generate --run a --prompt x")


def test_a_causal_model_is_exported_as_gpt2_with_its_tokenizer(cli, tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    like = "--model.init_args.config.activation=gelu_tanh --data.init_args.tokenizer=bpe --trainer.limit_val_batches=1 "
    like += "--data.init_args.bpe_vocab_size=270 --data.init_args.batch_size=2 --model.init_args.config.max_length=256"
    data = "--data.init_args.files=text.txt --data.init_args.cache_dir=cache --trainer.val_check_interval=4"
    fit(cli, "gpt", f"{like} {data} --model.init_args.config.positions=learned --data.init_args.block_size=64")
    assert "config.json, model.safetensors, tokenizer.json" in cli("export --run a --to theirs --hugging_face true")
    model = hf.AutoModelForCausalLM.from_pretrained("theirs").eval()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file="theirs/tokenizer.json")
    ids = tokenizer("the 7th line", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids).logits.shape[-1] == 270
    assert tokenizer.decode(ids[0]) == "the 7th line"
    with pytest.raises(SystemExit):
        cli("export --run a --to theirs --hugging_face true")
    assert "theirs exists already" in capsys.readouterr().err


def test_a_model_like_none_of_theirs_is_named(cli, tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    data = "--data.init_args.files=text.txt --data.init_args.cache_dir=cache --data.init_args.batch_size=2 "
    fit(cli, "default", f"{data} --trainer.val_check_interval=4 --trainer.limit_val_batches=1")
    with pytest.raises(SystemExit):
        cli("export --run a --to theirs --hugging_face true")
    error = capsys.readouterr().err
    assert "this model is none of Hugging Face's: as gpt2: expected positions=learned, got rotary" in error
    assert not (tmp_path / "theirs").exists()


def test_classification_says_what_is_to_be_beaten(cli, tmp_path):
    rows = [(f"word {i % 9}", "odd" if i % 3 == 1 else "even") for i in range(90)]
    write_table(tmp_path / "texts.csv", ("text", "label"), rows)
    out = fit(cli, "classification", "--data.init_args.files=texts.csv --data.init_args.tokenizer=bytes")
    assert "LitClassifier" in out
    assert "; the most frequent class: 0.6" in out
    assert "; a bag of words: 0." in out
