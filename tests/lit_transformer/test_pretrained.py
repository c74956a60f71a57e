"""Hugging Face models under our recipe: the same logits and loss as theirs, phases, LoRA, export."""

import sys
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parent))

from fine_tuning_worker import fine_tune, samples

from helpers import make_trainer, two_ranks
from hf_models import save_bert, save_bert_for, save_gpt2, save_t5
from lit_callbacks import ExactResume, GradualUnfreezing, VerifiedCheckpoint
from lit_transformer import ClassificationData, LitPretrained, Lora, ParamGroups, WarmupLinear
from lit_transformer.cli import main
from lit_transformer.errors import UsageError
from lit_transformer.hugging_face import keeps_apart


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"bert": save_bert(root / "bert"), "gpt2": save_gpt2(root / "gpt2"), "t5": save_t5(root / "t5")}


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(samples(), 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(), 8)


ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01)


@pytest.mark.parametrize(
    ("name", "task", "auto"),
    [
        ("gpt2", "causal_lm", hf.AutoModelForCausalLM),
        ("bert", "masked_lm", hf.AutoModelForMaskedLM),
        ("bert", "classification", hf.AutoModelForSequenceClassification),
        ("gpt2", "classification", hf.AutoModelForSequenceClassification),
        ("t5", "seq2seq", hf.AutoModelForSeq2SeqLM),
    ],
)
def test_loss_of_hugging_face_batches_equals_hugging_faces(folders, tmp_path, name, task, auto):
    ours = LitPretrained(folders[name], task).eval()
    ours.save_pretrained(tmp_path)  # with the head that was newly initialised
    theirs = auto.from_pretrained(tmp_path)
    ids = torch.randint(5, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1, 0]) if task == "classification" else ids.clone()
    if task != "classification":
        labels[:, :2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.testing.assert_close(ours.training_loss(batch), theirs(**batch).loss, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(p, dict(theirs.named_parameters())[n]) for n, p in ours.model.named_parameters())


def test_it_is_in_training_mode_and_fp32(folders, tmp_path):
    model = hf.AutoModelForMaskedLM.from_pretrained(folders["bert"]).bfloat16()
    model.save_pretrained(tmp_path)
    ours = LitPretrained(str(tmp_path), "masked_lm")
    assert all(module.training for module in ours.modules())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_exactly_the_parameters_of_a_stage_move_also_when_resumed_in_it(folders, tmp_path):
    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):  # Lightning has no epoch start where one goes on
            self.on_train_epoch_start(trainer, pl_module)

        def on_train_epoch_start(self, trainer, pl_module):
            moved[trainer.current_epoch] = set()
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            now = dict(pl_module.named_parameters())
            moved[trainer.current_epoch] |= {name for name, p in self.before.items() if not torch.equal(now[name], p)}

    moved = {}
    whole = fine_tune(folders["bert"], tmp_path, 8, callbacks=[Watch()])
    everything = {name for name, _ in whole.named_parameters()}
    head = {name for name in everything if "classifier" in name or "pooler" in name}
    top = head | {name for name in everything if ".layer.1." in name}
    keys = {name for name in everything if name.endswith("key.bias")}  # adds the same to all logits: no gradient
    expected = [head, top - keys, everything - keys, everything - keys]
    assert [names - keys for names in moved.values()] == expected
    for step, epoch in ((2, 0), (6, 1), (10, 2), (14, 3)):
        moved = {}
        resumed = fine_tune(folders["bert"], tmp_path, 8, str(tmp_path / f"step={step}.ckpt"), callbacks=[Watch()])
        assert [names - keys for names in moved.values()] == expected[epoch:]
        assert all(torch.equal(p, whole.state_dict()[name]) for name, p in resumed.state_dict().items())


def test_two_ranks_fine_tune_what_one_process_does_also_when_resumed_in_each_stage(folders, tmp_path):
    alone = fine_tune(folders["bert"], tmp_path / "alone", 8).state_dict()
    ranks = two_ranks(Path(__file__).with_name("fine_tuning_worker.py"), tmp_path, "fine", folders["bert"])
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert "ddp_find_unused_parameters_true" in found.pop("refused")
    assert found["from 2"] == found["from 6"] == found["from 10"] == found["again"] == found["whole"]
    for name in ("whole", "views"):
        for key, value in found[name].items():
            torch.testing.assert_close(torch.tensor(value), alone[key], atol=1e-5, rtol=1e-4)


def test_frozen_then_unfrozen_it_learns(folders, tmp_path):
    task = LitPretrained(folders["bert"], "classification", num_labels=2, optimizer=ADAM, schedule=None)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    moved = []
    unfreezing = GradualUnfreezing(["*classifier*|*pooler*"], [2], [1.0, 1.0])
    for epochs in (2, 30):
        trainer = make_trainer(max_epochs=epochs, callbacks=[unfreezing], default_root_dir=tmp_path)
        trainer.fit(task, Data())
        moved.append({name for name, p in task.named_parameters() if not torch.equal(p, before[name])})
    assert moved[0] == {name for name in before if "classifier" in name or "pooler" in name}
    assert len(moved[1]) > 30
    assert {"val/loss", "val/accuracy", "val/f1"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["val/accuracy"] > 0.9  # the more frequent class is 0.6


def test_layer_decay_reaches_hugging_face_layers(folders, tmp_path):
    groups = ParamGroups(layer_decay=0.5)
    task = LitPretrained(folders["bert"], "classification", optimizer=ADAM, schedule=None, param_groups=groups)
    trainer = make_trainer(max_steps=1, default_root_dir=tmp_path)
    trainer.fit(task, Data())
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["layer_3_decay"] == pytest.approx(1e-2)
    assert rates["layer_2_decay"] == pytest.approx(5e-3)
    assert rates["layer_0_no_decay"] == pytest.approx(1.25e-3)


def test_a_checkpoint_needs_no_folder(folders, tmp_path):
    labels = ["no", "maybe", "yes"]
    task = LitPretrained(folders["bert"], "classification", labels, optimizer=ADAM, lora=Lora(rank=2))
    trainer = make_trainer(max_steps=2, default_root_dir=tmp_path)
    trainer.fit(task, Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LitPretrained.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.architecture["id2label"] == {0: "no", 1: "maybe", 2: "yes"}
    assert all(torch.equal(p, task.state_dict()[name]) for name, p in loaded.state_dict().items())


def test_lora_trains_the_addition_and_what_is_new_and_is_merged_on_export(folders, tmp_path):
    task = LitPretrained(folders["bert"], "classification", num_labels=2, optimizer=ADAM, lora=Lora(rank=2))
    trainable = {name for name, p in task.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name or "pooler" in name for name in trainable)
    assert any("pooler" in name for name in trainable)  # the folder had none
    trainer = make_trainer(max_steps=4, default_root_dir=tmp_path)
    trainer.fit(task, Data())
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    batch = {"input_ids": torch.arange(5, 13)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**batch).logits, task.eval().logits(batch), atol=1e-5, rtol=1e-5)


def test_fit_and_export_from_the_command_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"w{i % 45} w{(7 * i) % 45},{'odd' if i % 2 else 'even'}" for i in range(60)]
    Path("a.csv").write_text("\n".join(["text,label", *rows]))
    model = ["--model", "lit_transformer.LitPretrained", "--model.path", folders["bert"]]
    model += ["--model.task", "classification", "--model.lora.rank", "2"]
    data = ["--data", "lit_transformer.ClassificationData", "--data.files", "a.csv", "--data.batch_size", "8"]
    data += ["--data.tokenizer", folders["bert"], "--data.max_length", "32"]
    Path("c.yaml").write_text(
        "trainer: {max_steps: 4, log_every_n_steps: 2, accelerator: cpu, precision: 32-true, gradient_clip_val: 1.0}\n"
    )
    main(["fit", "--config", "c.yaml", *model, *data, "--run", "a"])
    assert "bert for classification" in capsys.readouterr().out
    main(["test", "--run", "a", "--ckpt_path", "last"])
    main(["export", "--run", "a", "--ckpt_path", "last", "--to", "out"])
    assert "model.safetensors, tokenizer.json" in capsys.readouterr().out
    exported = hf.AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert exported.config.id2label == {0: "even", 1: "odd"}
    trained = LitPretrained.load_from_checkpoint("runs/a/checkpoints/last.ckpt", weights_only=True).eval()
    batch = hf.AutoTokenizer.from_pretrained("out")(["w3 w4 w5"], return_tensors="pt")
    torch.testing.assert_close(exported(**batch).logits, trained.logits(batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit):
        main(["export", "--run", "a", "--ckpt_path", "last", "--to", "out"])
    assert "out exists already" in capsys.readouterr().err


def test_reinitialised_are_the_top_layers(folders):
    was = dict(hf.AutoModelForMaskedLM.from_pretrained(folders["bert"]).named_parameters())
    torch.manual_seed(1)
    now = dict(LitPretrained(folders["bert"], "masked_lm", reinit_layers=1).model.named_parameters())
    weights = {name for name in was if not torch.equal(was[name], now[name])}
    matrices = {name for name in was if ".layer.1." in name and was[name].ndim == 2}
    assert weights == matrices  # vectors begin at 0 and 1, where those of an untrained model are
    with pytest.raises(ValueError, match="at most 2"):
        LitPretrained(folders["bert"], "masked_lm", reinit_layers=3)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert", "causal_lm", "bert is a bert, which is no model for causal_lm"),
        ("gpt2", "seq2seq", "gpt2 is a gpt2, which is no model for seq2seq"),
        ("t5", "masked_lm", "no model for masked_lm"),
    ],
)
def test_another_kind_is_refused(folders, name, task, message):
    with pytest.raises(UsageError, match=message):
        LitPretrained(folders[name], task)


def test_places_where_no_model_is(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"there is no folder \./nowhere, and a name"):
        LitPretrained("./nowhere")
    with pytest.raises(UsageError, match="no model nobody/nothing can be loaded: not on the hub or in its cache"):
        LitPretrained("nobody/nothing")
    with pytest.raises(UsageError, match="can be loaded: not in that folder"):
        LitPretrained(str(tmp_path))


def test_weights_of_another_architecture_are_refused(folders, tmp_path):
    save_bert(tmp_path, layers=1)
    hf.BertConfig.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"another architecture .*layer\.1\."):
        LitPretrained(str(tmp_path), "masked_lm")


def test_what_the_data_refuses_is_said_without_scaffolding(folders, capsys):
    data = ["--data", "lit_transformer.ClassificationData", "--data.files", "nothere.csv"]
    model = ["--model", "lit_transformer.LitPretrained", "--model.path", folders["bert"]]
    with pytest.raises(SystemExit):
        main(["fit", *model, "--model.task", "classification", *data])
    error = capsys.readouterr().err.strip()
    assert error.endswith("error: expected a file or a glob that matches files, got 'nothere.csv'. Check the spelling.")


def test_predictions_need_no_targets(folders):
    task = LitPretrained(folders["bert"], "classification").eval()
    ids = torch.arange(5, 13)[None]
    found = task.predict_step({"input_ids": ids}, 0)
    assert sorted(found) == ["label", "probability"]
    with pytest.raises(UsageError, match="the batch has no targets"):
        LitPretrained(folders["bert"], "masked_lm").predict_step({"input_ids": ids}, 0)


def test_texts_longer_than_the_model_takes_are_refused(folders, tmp_path):
    class Long(Data):
        max_length = 33

    with pytest.raises(UsageError, match="the data has max_length=33, but the model max_position_embeddings=32"):
        make_trainer(max_steps=1, default_root_dir=tmp_path).fit(LitPretrained(folders["bert"], "masked_lm"), Long())


def test_data_that_does_not_fit_is_refused(folders, tmp_path):
    class Wide(Data):
        vocab_size = 256

    with pytest.raises(UsageError, match="the data has vocab_size=256, but the model vocab_size=50"):
        make_trainer(max_steps=1, default_root_dir=tmp_path).fit(LitPretrained(folders["bert"], "masked_lm"), Wide())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give path"),
        ({"path": "a", "architecture": {}}, "give path"),
        ({"path": "a", "task": "translation"}, "task must be one of"),
        ({"path": "a", "reinit_layers": -1}, "reinit_layers must be at least 0"),
        ({"path": "a", "reinit_layers": 1, "lora": Lora()}, "do not go together"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LitPretrained(**settings)


def test_lora_targets_that_are_not_there(folders):
    with pytest.raises(UsageError, match="q_proj"):
        LitPretrained(folders["gpt2"], lora=Lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Lora(rank=0)


@pytest.mark.slow
def test_on_a_real_task_stages_move_what_they_should_and_it_learns(tmp_path):
    """From which package of the standard library is a function? A model and a tokenizer made on the spot."""

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            self.on_train_epoch_start(trainer, pl_module)

        def on_train_epoch_start(self, trainer, pl_module):
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_epoch_end(self, trainer, pl_module):
            names = {name for name, p in pl_module.named_parameters() if not torch.equal(p, self.before[name])}
            moved.append((trainer.current_epoch, names))

    texts = [text for text, _ in ClassificationData().samples["train"]]
    folder = str(tmp_path / "model")
    data = ClassificationData(tokenizer=save_bert_for(texts, folder), max_length=64)
    counts = data.class_counts()
    data.setup()
    half = data.batches_per_epoch() // 2  # the standard library is not as long everywhere

    def fine_tune(resume=None):
        torch.manual_seed(0)
        optimizer = partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.01)
        task = LitPretrained(folder, "classification", data.labels, optimizer=optimizer, schedule=WarmupLinear(0.06))
        trainer = make_trainer(
            max_epochs=4, gradient_clip_val=1.0, default_root_dir=tmp_path, enable_checkpointing=True,
            callbacks=[
                ExactResume(),
                GradualUnfreezing(["*classifier*|*pooler*"], [1], [1.0, 1.0]),
                VerifiedCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=half, save_top_k=-1),
                Watch(),
            ],
        )  # fmt: skip
        trainer.fit(task, datamodule=data, ckpt_path=resume)
        return task, trainer.callback_metrics

    moved = []
    task, metrics = fine_tune()
    head = {name for name, _ in task.named_parameters() if "classifier" in name or "pooler" in name}
    assert moved[0] == (0, head)
    assert [len(names - head) > 30 for _, names in moved] == [False, True, True, True]
    majority = max(counts.values()) / sum(counts.values())
    assert majority < 0.25
    assert metrics["val/accuracy"] > 0.45  # 0.56 when written; the class most frequent in training has less than 0.25
    for step, epoch in ((half, 0), (5 * half, 2)):
        stages, moved = moved, []
        resumed, again = fine_tune(str(tmp_path / "ck" / f"step={step}.ckpt"))
        assert moved == stages[-len(moved) :]
        assert moved[0][0] == epoch
        assert again["val/accuracy"] == metrics["val/accuracy"]
        assert all(torch.equal(p, task.state_dict()[name]) for name, p in resumed.state_dict().items())
        moved = stages


class Packed(LightningDataModule):
    packing, vocab_size = True, 50


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_documents_that_share_a_block_are_told_apart(family, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(hf, f"{family}Config")(**small, **tokens)
    if family == "GPT2":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    task = LitPretrained(architecture=config.to_dict(), schedule=None)
    ids, number = torch.randint(50, (2, 10)), torch.tensor([[0] * 4 + [1] * 6] * 2)
    alone = torch.cat([task.logits({"input_ids": part}) for part in ids.split([4, 6], dim=1)], dim=1)
    torch.testing.assert_close(task.logits({"input_ids": ids, "document_ids": number}), alone)
    assert keeps_apart(task.model)
    assert task.model.training


def test_models_whose_documents_would_see_each_other_are_refused(tmp_path):
    small = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = hf.OPTConfig(num_hidden_layers=1, ffn_dim=32, word_embed_proj_dim=16, **small)
    for task in (
        LitPretrained(architecture=config.to_dict(), schedule=None),
        LitPretrained(save_bert(tmp_path / "bert"), task="masked_lm", schedule=None),
    ):
        with pytest.raises(UsageError, match="the documents of a block would see each other; leave packing out"):
            make_trainer(max_steps=1, default_root_dir=tmp_path).fit(task, Packed())
