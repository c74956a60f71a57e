"""A student learns its teacher's probabilities; ours from ours, ours from Hugging Face's."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hf_models import save_gpt2, save_t5
from lit_transformer import Distillation, LitCausalLM, LitPretrained
from lit_transformer.errors import UsageError
from tiny_task import TINY, Blocks, trainer

ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


def test_divergence_is_that_of_the_formula():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    counted = torch.tensor([[True, True, False], [True, False, False]])
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1)[counted].mean()
    found = Distillation("t", temperature=3.0).divergence(student, teacher, counted)
    torch.testing.assert_close(found, expected)
    assert Distillation("t", weight=0.25).mix(torch.tensor(1.0), torch.tensor(3.0)) == pytest.approx(1.5)


def teacher_checkpoint(tmp_path):
    torch.manual_seed(3)
    teacher = LitCausalLM(TINY, optimizer=ADAM, schedule=None)
    fit = trainer(tmp_path, max_epochs=20)
    fit.fit(teacher, Blocks())
    fit.save_checkpoint(tmp_path / "teacher.ckpt")
    return teacher.eval()


def test_the_student_comes_to_say_what_the_teacher_says(tmp_path):
    teacher = teacher_checkpoint(tmp_path)
    distillation = Distillation(str(tmp_path / "teacher.ckpt"), weight=1.0)
    student = LitCausalLM(TINY, optimizer=ADAM, schedule=None, distillation=distillation)
    assert len(student.state_dict()) == len(teacher.state_dict())
    batch = next(iter(Blocks().val_dataloader()))

    def distance():
        everything = torch.ones_like(batch["targets"], dtype=torch.bool)
        with torch.no_grad():
            return distillation.divergence(student.eval().logits(batch), teacher.logits(batch), everything)

    before = distance()
    fit = trainer(tmp_path, max_epochs=20)
    fit.fit(student.train(), Blocks())
    assert distance() < 0.2 * before
    metrics = fit.callback_metrics
    torch.testing.assert_close(metrics["train/loss"], metrics["train/distillation"])
    assert "train/task_loss" in metrics
    assert all(not p.requires_grad for p in student._teacher[0].parameters())


def test_it_survives_a_checkpoint(tmp_path):
    teacher_checkpoint(tmp_path)
    student = LitCausalLM(TINY, distillation=Distillation(str(tmp_path / "teacher.ckpt"), temperature=4.0))
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(student, Blocks())
    fit.save_checkpoint(tmp_path / "student.ckpt")
    loaded = LitCausalLM.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert loaded.distillation == student.distillation
    assert loaded._teacher == ()


def test_a_hugging_face_teacher(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", vocab_size=11)
    student = LitCausalLM(TINY, optimizer=ADAM, schedule=None, distillation=Distillation(folder))
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(student, Blocks())
    assert fit.callback_metrics["train/distillation"] > 0


def test_a_teacher_of_ours_for_a_hugging_face_student(tmp_path):
    teacher_checkpoint(tmp_path)
    folder = save_gpt2(tmp_path / "gpt2", vocab_size=11)
    distillation = Distillation(str(tmp_path / "teacher.ckpt"))
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(LitPretrained(folder, optimizer=ADAM, schedule=None, distillation=distillation), Blocks())
    assert fit.callback_metrics["train/distillation"] > 0


def test_sequence_to_sequence_with_targets_alone(tmp_path):
    folder = save_t5(tmp_path / "t5")
    student = LitPretrained(folder, "seq2seq", distillation=Distillation(folder))
    student._teacher = (LitPretrained(folder, "seq2seq").eval(),)
    ids = torch.randint(5, 50, (2, 6))
    batch = {"input_ids": ids, "targets": ids.flip(1)}
    logits = student.eval().logits(batch)
    assert student._divergence(batch, logits, batch["targets"]).abs() < 1e-5  # they are the same


def test_several_labels_a_sample_are_refused(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="multi_label is set"):
        LitPretrained(folder, "classification", multi_label=True, distillation=Distillation("t"))


def test_what_does_not_fit_is_refused(tmp_path):
    other = save_gpt2(tmp_path / "gpt2")
    with pytest.raises(UsageError, match=r"logits of shape \(4, 8, 50\), the student of \(4, 8, 11\)"):
        trainer(tmp_path, max_steps=1).fit(LitCausalLM(TINY, distillation=Distillation(other)), Blocks())
    with pytest.raises(UsageError, match=r"there is no folder /nowhere/t\.ckpt"):
        trainer(tmp_path, max_steps=1).fit(LitCausalLM(TINY, distillation=Distillation("/nowhere/t.ckpt")), Blocks())
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    bad = Distillation(str(tmp_path / "bad.ckpt"))
    with pytest.raises(UsageError, match=r"bad\.ckpt cannot be read as a checkpoint"):
        trainer(tmp_path, max_steps=1).fit(LitCausalLM(TINY, distillation=bad), Blocks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0}, "temperature must be above"), ({"weight": 0}, "weight must be above")],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation("t", **settings)
