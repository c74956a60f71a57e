"""Back-translation: each text once, by functions, by Hugging Face's models and by ours; what is wrong is named."""

import json
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helpers import make_trainer
from hf_models import save_bart, save_bert, save_t5
from lit_transformer import BackTranslation, LitSeq2Seq, SentenceShuffle, SequencePairData, TransformerConfig
from lit_transformer.data.augmentation.specs import to_spec
from lit_transformer.data.augmentation.translators import load_translator
from lit_transformer.errors import UsageError

TEXTS = [f"w{i % 40} w{7 * i % 40}" + " w1" * (i % 5) for i in range(20)]


class Translator:
    """Puts a mark behind each text, and remembers what it was asked."""

    def __init__(self, mark):
        self.mark, self.asked = mark, []

    def __call__(self, texts):
        self.asked.append(texts)
        return [text + self.mark for text in texts]


def test_each_text_is_translated_once_in_batches_of_like_length():
    to, back = Translator(" to"), Translator(" back")
    augmentation = BackTranslation(to, back, probability=0.4, batch_size=3)
    texts = ["ccc", "a", "bb", "a", "ddddd"]
    assert augmentation.prepare(texts) == ["a to back", "bb to back", "ccc to back", "ddddd to back"]
    assert to.asked == [["a", "bb", "ccc"], ["ddddd"]]
    assert back.asked == [["a to", "bb to", "ccc to"], ["ddddd to"]]
    assert augmentation.prepare([*texts, "e"])[-1] == "e to back"
    assert to.asked[2:] == [["e"]]
    generator = np.random.default_rng(0)
    said = [augmentation("bb", generator) for _ in range(2000)]
    assert set(said) == {"bb", "bb to back"}
    assert abs(said.count("bb") / 2000 - 0.6) < 4 * (0.24 / 2000) ** 0.5
    assert len(to.asked) == 3


def test_what_comes_back_empty_stays_and_nothing_is_asked_of_it():
    back = Translator("")
    augmentation = BackTranslation(lambda texts: ["" if text == "a" else " " + text for text in texts], back, 1.0)
    assert augmentation.prepare(["a", "b"]) == []
    assert back.asked == [[" b"]]
    assert [augmentation(text, np.random.default_rng(0)) for text in ("a", "b")] == ["a", "b"]


def test_a_hugging_face_model_writes_in_batches_what_it_writes_alone(tmp_path):
    there, again = save_bart(tmp_path / "to", seed=1), save_bart(tmp_path / "back", seed=2)
    state = torch.get_rng_state()
    augmentation = BackTranslation(there, again, 1.0, batch_size=8)
    augmentation.prepare(TEXTS)
    assert torch.equal(torch.get_rng_state(), state)  # of what is trained afterwards

    def alone(folder, texts):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
            written = model.generate(ids, do_sample=False, max_length=None, max_new_tokens=32)
            yield tokenizer.decode(written[0], skip_special_tokens=True) if text else ""

    written = alone(again, alone(there, TEXTS))
    expected = [new or text for text, new in zip(TEXTS, written, strict=True)]
    found = [augmentation(text, np.random.default_rng(0)) for text in TEXTS]
    assert found == expected
    assert len(set(found)) > 5
    assert len(set(found) - set(TEXTS)) > 5


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of a model that has learned to write capitals, and the model."""
    folder = tmp_path_factory.mktemp("ours")
    pairs = [{"source": n * a, "target": 2 * a.upper()} for a in "abcde" for n in (1, 2, 3)] * 40
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        data = SequencePairData(files=str(folder / "a.jsonl"), max_length=8, max_target_length=8)
        torch.manual_seed(0)
        config = TransformerConfig(d_model=32, n_layers=1, n_heads=2, max_length=8)
        task = LitSeq2Seq(config, data.eos_id, scored_samples=0, beams=2, max_new_tokens=4, schedule=None)
        task.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=0.01)
        trainer = make_trainer(max_steps=120, max_epochs=-1, limit_val_batches=0)
        trainer.fit(task, data)
    trainer.save_checkpoint(folder / "a.ckpt")
    return str(folder / "a.ckpt"), task.eval()


def test_a_checkpoint_of_ours_writes_in_batches_what_it_writes_alone(ours):
    path, task = ours
    translate, texts = load_translator(path), ["a", "ccc", "edcba", "dd"]
    alone = [bytes(task.write(torch.tensor([list(text.encode())]))[0]).decode(errors="replace") for text in texts]
    assert translate(texts) == alone
    assert (alone[0], alone[1], alone[3]) == ("AA", "CC", "DD")
    augmentation = BackTranslation(path, lambda texts: [text.lower() + "." for text in texts], 1.0)
    assert augmentation.prepare(["b", "dd"]) == ["bb.", "dd."]


def test_two_of_them_translate_what_the_other_makes():
    first, second = (BackTranslation(Translator(mark), Translator(""), 1.0) for mark in "12")
    data = SequencePairData(augmentations=[first, second])
    assert [a is b for a, b in zip(data._augmentations, (first, second), strict=True)] == [True, True]
    made = first.prepare(["a"])
    assert second.prepare(["a", *made]) == ["a12", "a2"]
    assert second(first("a", np.random.default_rng(0)), np.random.default_rng(0)) == "a12"


def test_a_file_remembers_for_the_next_run(tmp_path):
    file, mark = tmp_path / "new" / "a.jsonl", Translator(" é\n.")
    BackTranslation(mark, as_it_is, 1.0, file=str(file)).prepare(["a"])
    lines = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == [f"{__name__}.Translator", f"{__name__}.as_it_is"]
    assert [json.loads(line) for line in lines[1:]] == [["a", "a é\n."]]
    asked = len(mark.asked)
    again = BackTranslation(mark, as_it_is, 1.0, file=str(file))
    assert again.prepare(["a"]) == ["a é\n."]
    assert len(mark.asked) == asked
    assert again.prepare(["a", "b"]) == ["a é\n.", "b é\n."]
    assert mark.asked[asked:] == [["b"]]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert [path.name for path in file.parent.iterdir()] == ["a.jsonl"]
    with pytest.raises(UsageError, match=r"expected in .*a\.jsonl what \['other/model', .* have made, got texts of"):
        BackTranslation("other/model", mark, file=str(file)).prepare(["a"])
    file.write_text("no JSON")
    with pytest.raises(UsageError, match=r"a\.jsonl cannot be read as JSON lines of texts: .*; name another file"):
        BackTranslation(mark, as_it_is, file=str(file)).prepare(["a"])
    taken = BackTranslation(mark, as_it_is, file=str(file / "b.jsonl"))
    with pytest.warns(UserWarning, match="cannot be kept in"):
        taken.prepare(["a"])


def as_it_is(texts):
    return texts


def one_of_two(rank, folder):
    """A process that translates; one of them cannot do it the second time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    to = Translator("")
    file = folder / f"of_rank_{rank}.jsonl"  # which of the two has it is told to the other
    if rank == 0:
        file.write_text(json.dumps([f"{__name__}.one_of_two.<locals>.do", f"{__name__}.Translator"]) + '\n["f", "g"]\n')

    def do(texts):
        return 1 / 0 if "dddd" in texts else to(texts)

    augmentation = BackTranslation(do, Translator("!"), file=str(file))
    found = {"made": augmentation.prepare(["f", "ccc", "a", "bb"]), "asked": to.asked, "error": ""}
    try:
        augmentation.prepare(["e", "dddd"])
    except UsageError as error:
        found["error"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_share_the_work_and_learn_of_an_error(tmp_path):
    fork = multiprocessing.get_context("fork")  # all modules are there, and nothing is computed
    processes = [fork.Process(target=one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons would rather not fork beside threads
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["asked"] for rank in found] == [[["a", "ccc"], ["e"]], [["bb"]]]
    assert [rank["made"] for rank in found] == [["a!", "bb!", "ccc!", "g"]] * 2
    assert [(tmp_path / f"of_rank_{rank}.jsonl").exists() for rank in range(2)] == [True, False]
    assert ["ZeroDivisionError" in rank["error"] for rank in found] == [True, True]


def test_what_a_checkpoint_says_of_it():
    augmentation = BackTranslation("a/b", "c/d", 0.3)
    arguments = {"to": "a/b", "back": "c/d", "probability": 0.3, "batch_size": 32, "file": None}
    path = "lit_transformer.data.augmentation.back_translation.BackTranslation"
    assert to_spec(augmentation) == {"class_path": path, "init_args": arguments}
    name = f"{__name__}.Translator"
    expected = f"{path}(to='a/b', back={name}, probability=0.5, batch_size=32, file=None)"
    assert to_spec(BackTranslation("a/b", len)) == expected.replace(name, "builtins.len")


def test_what_is_wrong(tmp_path, ours):
    def prepare(to):
        BackTranslation(to, Translator("")).prepare(["ab"])

    with pytest.raises(UsageError, match=r"return a list of 1 texts for as many, got \['AB', 'AB'\]"):
        prepare(lambda texts: [text.upper() for text in texts] * 2)
    with pytest.raises(UsageError, match="return a list of 1 texts for as many, got 'x'"):
        prepare(lambda texts: "x")
    with pytest.raises(UsageError, match=r"return a list of 1 texts for as many, got .None."):
        prepare(lambda texts: [None])
    with pytest.raises(UsageError, match=r"the translator .*lambda.* failed on 'ab': ZeroDivisionError"):
        prepare(lambda texts: 1 / 0)
    with pytest.raises(UsageError, match="there is no folder no/such/model"):
        prepare("no/such/model")
    with pytest.raises(UsageError, match="is a bert, which is no model for seq2seq"):
        prepare(save_bert(tmp_path / "bert"))
    with pytest.raises(UsageError, match="knows 50 tokens, and its tokenizer has 104: save the tokenizer"):
        prepare(save_t5(tmp_path / "t5"))
    contents = torch.load(ours[0], weights_only=True)
    for key, message in (("SequencePairData", "does not hold the tokenizer"), ("hyper_parameters", "not a checkpoint")):
        torch.save({name: value for name, value in contents.items() if name != key}, tmp_path / "a.ckpt")
        with pytest.raises(UsageError, match=message):
            prepare(str(tmp_path / "a.ckpt"))
    torch.save(contents | {"hyper_parameters": {"config": {}}}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="is no checkpoint of LitSeq2Seq"):
        prepare(str(tmp_path / "a.ckpt"))
    with pytest.raises(UsageError, match="probability must be above 0 and at most 1, got 0"):
        BackTranslation("a", "b", probability=0.0)
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        BackTranslation("a", "b", batch_size=0)
    with pytest.raises(
        UsageError, match=r"BackTranslation prepares .* what .*SentenceShuffle makes of them: put it in"
    ):
        SequencePairData(augmentations=[SentenceShuffle(), BackTranslation("a", "b")])
