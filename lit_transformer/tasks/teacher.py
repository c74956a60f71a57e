"""A trained model to learn from."""

from pathlib import Path

from lit_transformer.checkpoint_files import read_checkpoint
from lit_transformer.errors import UsageError
from lit_transformer.task import LitTask
from lit_transformer.tasks.causal_lm import LitCausalLM
from lit_transformer.tasks.classifier import LitClassifier
from lit_transformer.tasks.masked_lm import LitMaskedLM
from lit_transformer.tasks.pretrained import LitPretrained
from lit_transformer.tasks.seq2seq import LitSeq2Seq

_OURS: dict[str, type[LitTask]] = {
    "causal_lm": LitCausalLM,
    "masked_lm": LitMaskedLM,
    "classification": LitClassifier,
    "seq2seq": LitSeq2Seq,
}
_SHAPE = ("config", "num_labels", "multi_label", "pooling", "causal")


def load_teacher(path: str, kind: str) -> LitTask:
    """A model of a kind, from a checkpoint of ours, or from a Hugging Face folder or name.

    No class is imported because a file names it.

    Raises:
        UsageError: If there is no such model, or it predicts something else.
    """
    if not Path(path).is_file():
        return LitPretrained(path, task=kind)  # type: ignore[arg-type]
    contents = read_checkpoint(path)
    settings = contents["hyper_parameters"]
    if "architecture" in settings:
        multi_label = settings["multi_label"]
        teacher: LitTask = LitPretrained(
            architecture=settings["architecture"], task=settings["task"], multi_label=multi_label, lora=settings["lora"]
        )
    elif kind in _OURS and "config" in settings:
        teacher = _OURS[kind](**{name: settings[name] for name in _SHAPE if name in settings})
    else:
        raise UsageError(f"the teacher {path} is not a model for {kind}")
    if teacher.kind != kind:
        raise UsageError(f"the teacher {path} is a model for {teacher.kind}, the student for {kind}")
    try:
        teacher.load_state_dict(contents["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"the weights of the teacher {path} do not fit its configuration: {error}") from None
    return teacher
