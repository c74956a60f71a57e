"""A run's configuration as flat text, without secrets."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_callbacks._redaction import redacted

# A secret by its name, or by that of what it is in: "hf_token" and "apiKey" are, "pad_token", "max_tokens",
# "token_dropout" and "n_kv_heads" are not.
_SECRET = re.compile(
    r"(?:^|[._-])(?:(?:api|access|secret|private|auth|hf|wandb|bearer)[_-]?(?:key|token)s?(?:[_-](?:id|pem))?|"
    r"(?<!pad[_-])(?<!eos[_-])(?<!bos[_-])(?<!unk[_-])(?<!sep[_-])(?<!cls[_-])(?<!mask[_-])token|(?<![_-])tokens|"
    r"[a-z]*passw(?:or)?ds?|passphrases?|pass|pem|secrets?|credentials?|authorization)(?:\.|$)",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")
_LONGEST = 400  # characters of a value


def without_secrets(text: str) -> str:
    """Text in which no value of a secret environment variable and no login of an address stands.

    Example:
        >>> without_secrets("s3://name:password@host/bucket")
        's3://<redacted>@host/bucket'
    """
    return _LOGIN.sub("<redacted>", str(redacted(text)))


def plain(data: Any) -> Any:
    r"""Nested data as text files can hold it: without secrets, lone surrogates and numbers that are not finite.

    Example:
        >>> plain({"score": float("nan"), "where": ["s3://token@host", "a\ud800"]})
        {'score': 'nan', 'where': ['s3://<redacted>@host', 'a?']}
    """
    if isinstance(data, dict):
        return {plain(key): plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [plain(item) for item in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return without_secrets(data).encode(errors="replace").decode() if isinstance(data, str) else data


def flat(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested configuration, as names with dots and text.

    Example:
        >>> list(flat({"a": {"b": 1, "api_key": "x"}, "c": [1, 2], "d": {}}))
        [('a.b', '1'), ('a.api_key', '<redacted>'), ('c', '[1, 2]'), ('d', '{}')]
    """
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(config, list) and any(isinstance(item, dict) for item in config):
        for i, value in enumerate(config):
            yield from flat(value, f"{name}.{i}")
    elif config not in (None, "") and _SECRET.search(_HUMP.sub("_", name)):
        yield name, "<redacted>"
    else:
        yield name, _cut(plain(str(config)))


def read_settings(path: Path) -> dict[str, str]:
    """A YAML file, flat. One that is not plain YAML is given line by line.

    Raises:
        OSError: If it cannot be read.
    """
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return dict(flat(yaml.safe_load(text) or {}))
    except (yaml.YAMLError, RecursionError):  # Lightning's hparams.yaml may hold Python objects
        lines = [line.partition(":") for line in text.splitlines() if ":" in line]
        found = ((key.strip(" -"), value.strip()) for key, _, value in lines)
        return {key: next(text for _, text in flat(value, key)) for key, value in found}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"
