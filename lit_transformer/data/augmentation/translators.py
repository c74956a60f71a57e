"""Models that make a text of a text: checkpoints of ours, and Hugging Face's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_transformer.checkpoint_files import read_checkpoint
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.tokenizer import from_json
from lit_transformer.errors import UsageError

Translator = Callable[[list[str]], list[str]]
"""A translation of each of some texts."""

_LONGEST = 512  # of Hugging Face models without positions of their own


def load_translator(path: str) -> Translator:
    """A translator from a checkpoint of ours, or from a Hugging Face folder or name; on a GPU if there is one.

    No class is imported because a file names it.

    Raises:
        UsageError: If there is no such model, it is none for sequence to sequence, or it comes without its tokenizer.
    """
    return _ours(path) if Path(path).is_file() else _hugging_face(path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"  # the current one, which is this process's own


def _padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of some texts."""
    ids, mask = Ragged(rows).pad(np.arange(len(rows)), pad_id)
    return torch.from_numpy(ids).to(_device()), torch.from_numpy(mask).to(_device())


def _ours(path: str) -> Translator:
    """By a checkpoint of LitSeq2Seq, as it writes in evaluation."""
    from lit_transformer.tasks import LitSeq2Seq  # tasks are made for data, not data of tasks

    contents = read_checkpoint(path)
    settings = contents["hyper_parameters"]
    if "config" not in settings or "beams" not in settings:
        raise UsageError(
            f"{path} is no checkpoint of LitSeq2Seq, so it cannot translate; of a Hugging Face model, give the folder "
            "that export writes"
        )
    saved = contents.get("SequencePairData", {}).get("tokenizer")
    if saved is None:
        raise UsageError(f"{path} does not hold the tokenizer of its data, so it cannot translate; give a function")
    names = ("config", "eos_id", "beams", "length_penalty", "max_new_tokens")
    task, tokenizer = LitSeq2Seq(**{name: settings[name] for name in names}), from_json(saved)
    try:
        task.load_state_dict(contents["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"the weights of the translator {path} do not fit its configuration: {error}") from None
    task.eval().to(_device())
    longest = task.config.max_length

    def translate(texts: list[str]) -> list[str]:
        rows = [tokenizer.encode(text)[:longest].tolist() for text in texts]
        return [tokenizer.decode(ids) for ids in task.write(*_padded(rows, task.eos_id))]

    return translate


def _hugging_face(path: str) -> Translator:
    """By a model of Hugging Face, as its generation_config.json says, but without drawing."""
    from lit_transformer.hugging_face import load

    model, fresh = load(path, "seq2seq")
    if fresh:
        raise UsageError(f"the translator {path} lacks the weights {', '.join(fresh)}: it would write at random")
    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    encoder, tokens = Encoder(path, longest), model.config.vocab_size
    if not tokens / 2 < encoder.vocab_size <= tokens:  # transformers makes up one of a few tokens where there is none
        raise UsageError(
            f"the translator {path} knows {tokens} tokens, and its tokenizer has {encoder.vocab_size}: save the "
            "tokenizer that it was trained with in the same folder"
        )
    model.eval().to(_device())
    model.generation_config.max_length = None  # 20 by default, and a warning beside max_new_tokens

    @torch.inference_mode()
    def translate(texts: list[str]) -> list[str]:
        ids, mask = _padded(encoder(texts)[0], encoder.pad_id)
        written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=longest)
        return [encoder.decode(row) for row in written.tolist()]

    return translate
