"""Folders that are made once, and found again by what they depend on."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_transformer.data.text.unfinished import unfinished_folder


def cached_folder(cache_dir: str | None, key: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of a key, made unless it is there.

    It appears complete or not at all, whoever is interrupted, and whoever else is at it. It may be deleted at any time.

    Args:
        cache_dir: Where folders are kept; by default ``lit-transformer`` in the user's cache folder, and in that for
            temporary files, with a warning, where nothing can be written.
        key: A name for the outcome.
        write: Fills the folder.

    Example:
        >>> folder = cached_folder(tempfile.mkdtemp(), "abc", lambda made: (made / "x").touch())
        >>> [path.name for path in folder.iterdir()]
        ['x']
    """
    folder = _root(cache_dir) / key
    if not os.path.exists(folder):  # noqa: PTH110  # Path.exists raises where a folder may not be entered
        root = _writable(folder.parent)
        folder = root / key
        if not folder.exists():
            with unfinished_folder(root, key) as unfinished:
                write(unfinished)
    return folder


def _root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-transformer"


def _writable(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError as error:
        user = getattr(os, "getuid", int)()
        fallback = Path(tempfile.gettempdir(), f"lit-transformer-{user}")
        rank_zero_warn(f"The cache folder cannot be written ({error}); using {fallback}. Set cache_dir to choose one.")
        fallback.mkdir(exist_ok=True)
        return fallback
