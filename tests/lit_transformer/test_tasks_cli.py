"""The tasks from the command line: what is printed, predicted, written and exported."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

from hf_models import save_bert
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

    run.printed = lambda: capsys.readouterr().out
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


def predictions(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_a_classifier_predicts_from_its_checkpoint_alone(cli, tmp_path, capsys):
    rows = [(f"{'good' if i % 3 else 'bad'} word {i % 9}", "yes" if i % 3 else "no") for i in range(90)]
    write_table(tmp_path / "texts.csv", ("text", "label"), rows)
    data = "--data.init_args.files=texts.csv --data.init_args.tokenizer=bpe --data.init_args.bpe_vocab_size=270 "
    fit(cli, "classification", f'{data} --data.init_args.class_weights={{"no":2.0}} --trainer.max_steps=30')
    checkpoint = Path("kept.ckpt")
    (tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt").resolve().rename(checkpoint)
    (tmp_path / "texts.csv").unlink()
    write_table(tmp_path / "new.csv", ("text",), [(text,) for text, _ in rows[:20]])
    cli(f"predict --ckpt_path {checkpoint} --data.init_args.predict_files=new.csv --trainer.default_root_dir=out")
    found = predictions(tmp_path / "out" / "predictions.csv")
    assert found[0].keys() == {"sample_ids", "label", "probability"}
    assert [row["label"] for row in found] == [label for _, label in rows[:20]]
    write_table(tmp_path / "other.csv", ("text", "label"), rows[1:3])  # one class, which is number 0 there and 1 here
    out = cli(f"test --ckpt_path {checkpoint} --data.init_args.test_files=other.csv")
    assert re.search(r"test/accuracy +1\.00000", out)
    write_table(tmp_path / "worse.csv", ("text", "label"), [*rows[:2], ("word", "maybe")])
    with pytest.raises(SystemExit):
        cli(f"test --ckpt_path {checkpoint} --data.init_args.test_files=worse.csv")
    assert "line 4 of " in (error := capsys.readouterr().err)
    assert "worse.csv has the class 'maybe', which training has not" in error


def test_a_writer_predicts_from_its_checkpoint_alone(cli, tmp_path):
    write_table(tmp_path / "pairs.csv", ("source", "target"), [(f"word {i % 9}", f"{i % 9} drow") for i in range(80)])
    sizes = "--data.init_args.tokenizer=bpe --data.init_args.bpe_vocab_size=262 --data.init_args.batch_size=8"
    fit(cli, "seq2seq", f"--data.init_args.files=pairs.csv {sizes} --trainer.limit_val_batches=0")
    (tmp_path / "pairs.csv").rename(tmp_path / "test.csv")
    (tmp_path / "new.jsonl").write_text('{"source": "word 1"}\n{"source": "word 2"}\n')
    cli("predict --run a --ckpt_path last --data.init_args.predict_files=new.jsonl")
    found = predictions(tmp_path / "runs" / "a" / "predictions.csv")
    assert [list(row) for row in found] == [["sample_ids", "text"]] * 2
    assert "test/bleu" in cli("test --run a --ckpt_path last --data.init_args.test_files=test.csv")
    assert cli("generate --run a --prompt word --ckpt_path last").endswith("\n")


def test_a_fine_tuned_classifier_predicts_without_the_folder_it_is_from(cli, tmp_path):
    rows = [(f"w{i % 9}", "yes" if i % 3 else "no") for i in range(60)]
    write_table(tmp_path / "texts.csv", ("text", "label"), rows)
    save_bert(tmp_path / "bert")
    where = "--model.init_args.path=bert --data.init_args.tokenizer=bert --data.init_args.max_length=16"
    cli(f"fit --config finetune_classifier {FAST} {where} --data.init_args.files=texts.csv --trainer.callbacks=null")
    shutil.rmtree(tmp_path / "bert")
    (tmp_path / "texts.csv").rename(tmp_path / "new.csv")
    cli("predict --run a --ckpt_path last --data.init_args.predict_files=new.csv")
    found = predictions(tmp_path / "runs" / "a" / "predictions.csv")
    assert len(found) == 60
    assert {row["label"] for row in found} <= {"yes", "no"}


def test_a_classifier_starts_from_a_run_that_filled_in_masks(cli, tmp_path):
    write_text(tmp_path / "text.txt")
    write_table(tmp_path / "table.csv", ("text", "label"), [(f"word {i % 9}", i % 2) for i in range(80)])
    same = "--model.init_args.config.positions=rotary --model.init_args.config.max_length=32"
    sizes = "--data.init_args.tokenizer=bytes --data.init_args.batch_size=8"
    length = "--data.init_args.block_size=32 --trainer.val_check_interval=4"
    fit(cli, "masked_lm", f"{same} {sizes} {length} --data.init_args.files=text.txt")
    older = tmp_path / "runs" / "a" / "checkpoints" / "best-step=9.ckpt"  # another step's, which is not whole
    older.write_bytes(b"torn")
    shape = "--model.init_args.config.norm_placement=pre --model.init_args.config.qk_norm=true"
    start = "--run=b --model.init_args.init_from=runs/a --data.init_args.max_length=32"
    words = f"{same} {sizes} {shape} {start} --model.init_args.config.d_ff=null --data.init_args.files=table.csv"
    fit(cli, "classification", words)
    name = "model.encoder.token_embedding.weight"
    before, after = (
        torch.load(tmp_path / "runs" / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"][name]
        for run in ("a", "b")
    )
    assert (len(before), len(after)) == (257, 256)  # the last of them is the mask
    assert (after - before[:-1]).abs().max() < 0.02  # four steps of a classifier at 2e-3 from there
    assert (after - before[:-1]).abs().mean() < 0.1 * before[:-1].std()


def test_null_within_the_models_configuration_is_null_and_other_words_stay(cli):
    base = "fit --config classification --print_config"
    for words in ("--model.init_args.config.d_ff=null", "--model.init_args.config.d_ff null"):
        assert print_config(cli, f"{base} {words}")["model"]["init_args"]["config"]["d_ff"] is None
    found = print_config(cli, f"{base} --data.init_args.files=x/split=None --run a=None")
    assert found["data"]["init_args"]["files"] == "x/split=None"
    assert found["run"] == "a=None"


def print_config(cli, words):
    with pytest.raises(SystemExit) as stop:
        cli(words)
    assert not stop.value.code
    return yaml.safe_load(cli.printed())
