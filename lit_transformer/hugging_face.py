"""Hugging Face models, loaded and changed before training; errors as sentences."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from safetensors import SafetensorError
from torch import nn

from lit_transformer.errors import UsageError
from lit_transformer.optim.layers import layer_depths

Task = Literal["causal_lm", "masked_lm", "classification", "seq2seq"]

_AUTO_MODELS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
_PEFT_TASKS = {"causal_lm": "CAUSAL_LM", "masked_lm": None, "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
_NOT_LOADED = ("missing_keys", "mismatched_keys")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021), by ``peft``: train a product of two thin matrices beside each chosen one.

    Args:
        rank: Their inner width.
        alpha: The product is multiplied by ``alpha / rank``.
        dropout: On their input.
        target_modules: Names of the linear layers, such as ``[q_proj, v_proj]``; by default those that ``peft`` knows
            for the architecture.
        modules_to_save: Names of modules to train as a whole; by default the head, and what is newly initialised.

    Raises:
        ValueError: If a value is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def build(
    architecture: dict[str, Any], task: Task, names: Sequence[str] | None = None, multi_label: bool = False
) -> Any:
    """A model with random weights, of a configuration as a dict.

    Raises:
        UsageError: If it is of another kind, or ``transformers`` is missing.
    """
    hf = _transformers()
    config = hf.AutoConfig.for_model(**architecture)
    return _auto_model(config, task, names, multi_label, "the architecture").from_config(config)


def architecture_of(path: str) -> dict[str, Any]:
    """The configuration of a folder or of a name on the hub, as :func:`build` takes it, without its weights.

    Raises:
        UsageError: If there is none, or ``transformers`` is missing.
    """
    hf = _transformers()
    architecture: dict[str, Any] = _read(path, lambda: hf.AutoConfig.from_pretrained(path)).to_dict()
    return architecture


def load(path: str, task: Task, names: Sequence[str] | None = None, multi_label: bool = False) -> tuple[Any, list[str]]:
    """A model in fp32 with the weights of a folder or of a name on the hub; what they lack is newly initialised.

    Args:
        path: The folder or name.
        task: What the head is for.
        names: Names of the classes; by default as many as the model has.
        multi_label: Whether a sample may be in several.

    Raises:
        UsageError: If there is no such folder or name, it cannot be read, is of another kind, or lacks an embedding or
            a layer, or ``transformers`` is missing.

    Returns:
        The model, and the names of what is newly initialised.
    """
    hf = _transformers()
    config = _read(path, lambda: hf.AutoConfig.from_pretrained(path))
    auto = _auto_model(config, task, names, multi_label, path)
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _quiet(hf):
        model, info = _read(path, lambda: auto.from_pretrained(path, config=config, **options))
    fresh = sorted({key if isinstance(key, str) else key[0] for k in _NOT_LOADED for key in info[k]})
    depths = layer_depths(model)
    top = max(depths.values())
    if broken := [name for name in fresh if depths.get(name, top) < top]:
        raise UsageError(
            f"the weights in {path} are of another architecture than its config.json: {broken[0]} and "
            f"{len(broken) - 1} others are missing, or of another shape"
        )
    if fresh:
        rank_zero_info(f"Weights of {path}: newly initialised is {', '.join(fresh)}.")
    return model, fresh


def _auto_model(config: Any, task: Task, names: Sequence[str] | None, multi_label: bool, source: str) -> Any:
    """The class that makes models for the task, with the head written into ``config``."""
    hf = _transformers()
    auto = getattr(hf, _AUTO_MODELS[task])
    both_directions = type(config) in hf.AutoModelForMaskedLM._model_mapping and not getattr(
        config, "is_decoder", False
    )
    if type(config) not in auto._model_mapping or (task == "causal_lm" and both_directions):
        raise UsageError(f"{source} is a {config.model_type}, which is no model for {task}; set task to another")
    if task == "classification":
        if names is not None:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = config.eos_token_id  # a decoder looks for the last token that is none
    return auto


def _read(path: str, read: Callable[[], Any]) -> Any:
    """What is read, or a sentence that says where it was looked for."""
    is_folder = Path(path).is_dir()
    if not is_folder and not _HUB_NAME.fullmatch(path):
        raise UsageError(f"there is no folder {path}, and a name on the hub would be NAME or OWNER/NAME")
    where = "in that folder" if is_folder else "on the hub or in its cache, and there is no folder of that name"
    try:
        return read()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"no model {path} can be loaded: not {where}. {reason}") from None


@contextmanager
def _quiet(hf: Any) -> Iterator[None]:
    """Without a progress bar, and without the report of what is newly initialised: we have our own."""
    logging, level = hf.utils.logging, hf.utils.logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def reinitialize(model: nn.Module, new: nn.Module, n: int) -> None:
    """Give the top ``n`` layers of each stack, and poolers, the weights of a new model.

    Raises:
        ValueError: If there are fewer layers.
    """
    depths = layer_depths(model)
    top = max(depths.values())
    if n >= top:
        raise ValueError(f"reinit_layers must be at most {top - 1}, the number of layers, got {n}")
    weights = dict(new.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if top - n <= depths[name] < top or "pooler" in name:
                parameter.copy_(weights[name])


def with_lora(model: nn.Module, lora: Lora, task: Task) -> nn.Module:
    """The model with everything frozen but its head, and a low-rank addition.

    Raises:
        UsageError: If a target module does not exist, or ``peft`` is missing.
    """
    try:
        import peft
    except ImportError:
        raise UsageError("lora needs peft (extra hf): pip install peft") from None
    targets = None if lora.target_modules is None else list(lora.target_modules)
    config = peft.LoraConfig(
        task_type=_PEFT_TASKS[task],
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it only divides
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=list(lora.modules_to_save or []),
    )
    try:
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 for a property by its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora.target_modules={targets}: {error}") from None


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether what a causal model says of a document depends on none before it, when places begin at 0 again.

    Most of Hugging Face's build their mask so, and some do not: this is asked of two short sequences.
    """
    first, second = torch.arange(4), torch.arange(4, 8)
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = torch.stack((torch.cat((first, second)), torch.cat((second, second)))) % vocab_size
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        places = torch.arange(4).repeat(2, 2)
        said = model(input_ids=ids.to(device), position_ids=places.to(device), use_cache=False).logits[:, 4:]
    except TypeError:  # it takes no places
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return bool(torch.equal(said[0], said[1]))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError("LitPretrained needs transformers (extra hf): pip install transformers") from None
    return transformers
