"""Secrets of the environment do not belong into files and services."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters: shorter values are words like "true", which stand everywhere


def redacted(data: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Nested data in which no string holds the value of a secret environment variable; a copy, if any did.

    By value and not by key: keys such as ``pad_token`` or ``key_size`` are innocent, and a secret may have been given
    under any name.

    Args:
        data: Mappings, lists and tuples; everything that is not a string in them stays as it is.
        environ: Names and values; by default those of the process. Secret are those whose name says so: KEY, TOKEN,
            SECRET, PASSWORD, PASSWD, CREDENTIAL.

    Example:
        >>> redacted({"pad_token": "<pad>", "url": "https://u:hunter2hunter2@host"}, {"DB_PASSWORD": "hunter2hunter2"})
        {'pad_token': '<pad>', 'url': 'https://u:<redacted: DB_PASSWORD>@host'}
    """
    secrets = _secrets(os.environ if environ is None else environ)
    return _replace(data, secrets) if _mentions(data, secrets) else data


def _secrets(environ: Mapping[str, str]) -> dict[str, str]:
    found = {value: name for name, value in environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST}
    return {value: found[value] for value in sorted(found, key=len, reverse=True)}  # one may begin with another


def _mentions(data: Any, secrets: Mapping[str, str]) -> bool:
    if isinstance(data, str):
        return any(value in data for value in secrets)
    if isinstance(data, Mapping):
        return any(_mentions(item, secrets) for pair in data.items() for item in pair)
    return type(data) in (list, tuple) and any(_mentions(item, secrets) for item in data)


def _replace(data: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(data, str):
        for value, name in secrets.items():
            if value in data:
                data = data.replace(value, f"<redacted: {name}>")
        return data
    if isinstance(data, Mapping):
        return {_replace(key, secrets): _replace(value, secrets) for key, value in data.items()}
    if type(data) in (list, tuple):
        return type(data)(_replace(item, secrets) for item in data)
    return data
