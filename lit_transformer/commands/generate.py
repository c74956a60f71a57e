"""``generate``: write text from a prompt."""

import sys
from itertools import takewhile
from pathlib import Path

import torch

from lit_transformer.commands.checkpoints import load_checkpoint, locate
from lit_transformer.commands.parser import CommandParser
from lit_transformer.data import LanguageModelingData, SequencePairData
from lit_transformer.data.tokenizer import Tokenizer, from_json
from lit_transformer.errors import UsageError
from lit_transformer.nn import generate
from lit_transformer.nn.generation import check_sampling
from lit_transformer.tasks import LitCausalLM, LitSeq2Seq


def main(words: list[str]) -> None:
    """Parse the words after ``generate``, and stream the text to standard output.

    Raises:
        UsageError: For anything wrong in them, or in the checkpoint.
    """
    parser = CommandParser(
        prog="generate",
        description="Write text from a prompt, as it is sampled; of a sequence-to-sequence model, its target.",
    )
    parser.add_checkpoint_arguments()
    parser.add_argument("--prompt", type=str, default="", help="Text to go on from.")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="Tokens to write.")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token.")
    parser.add_argument("--top_k", type=int | None, default=None, help="Keep the k most likely tokens.")
    parser.add_argument("--top_p", type=float | None, default=None, help="Keep the most likely tokens that reach p.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw.")
    parser.add_argument("--use_cache", type=bool, default=True, help="Keep keys and values of earlier tokens.")
    options = parser.parse_args(words)
    if options.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from None

    task, tokenizer = _load(_checkpoint_path(options.ckpt_path, options.run, Path(options.root)))
    if isinstance(task, LitSeq2Seq):
        source = tokenizer.encode(options.prompt)[: task.config.max_length].tolist() or [tokenizer.eos_id]
        print(tokenizer.decode(task.write(torch.tensor([source], device=task.device))[0]))
        return
    prompt = tokenizer.encode(options.prompt).tolist() or [tokenizer.eos_id]
    sys.stdout.write(options.prompt)
    tokens = generate(
        task.model,
        prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        options.use_cache,
    )
    for piece in tokenizer.stream(takewhile(lambda token: token != tokenizer.eos_id, tokens)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _checkpoint_path(given: str | None, run: str | None, root: Path) -> str | Path:
    if given is None and run is None:
        raise UsageError("generate needs a checkpoint: --ckpt_path FILE, or --run NAME for the best one of a run")
    if given is None or given in ("best", "last"):
        return locate(root, run, given or "best")
    return given


def _load(path: str | Path) -> tuple[LitCausalLM | LitSeq2Seq, Tokenizer]:
    """Model and tokenizer, both from the checkpoint."""
    checkpoint = load_checkpoint(path)
    pairs = checkpoint.get(SequencePairData.__qualname__)
    data = checkpoint.get(LanguageModelingData.__qualname__) if pairs is None else pairs
    if data is None or data["tokenizer"] is None or "config" not in checkpoint.get("hyper_parameters", {}):
        raise UsageError(f"{path} does not hold a language model with its tokenizer, so it cannot write text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: type[LitCausalLM | LitSeq2Seq] = LitCausalLM if pairs is None else LitSeq2Seq
    task = kind.load_from_checkpoint(path, map_location=device, weights_only=True)
    return task.eval(), from_json(data["tokenizer"])
