"""Tokenizers of Hugging Face."""

from pathlib import Path
from typing import Any

from lit_transformer.errors import UsageError


def load(name: str) -> Any:
    """Load the tokenizer of a folder or name.

    Raises:
        UsageError: If there is none, or ``transformers`` is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(f"the tokenizer {name} needs transformers (extra hf): pip install transformers") from None
    if not Path(name).is_dir() and ("/" not in name or name.count("/") > 1 or name.startswith((".", "/"))):
        raise UsageError(
            f"expected tokenizer to be 'bytes', 'bpe', 'unigram', a tokenizer.json, or the folder or OWNER/NAME of a "
            f"Hugging Face tokenizer, got {name!r}, and there is no such folder"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"no tokenizer can be loaded from {name}: {reason}") from None
