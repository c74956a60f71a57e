"""Which configuration a command starts from."""

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lit_transformer.errors import UsageError
from lit_transformer.run.folder import RunFolder

_PACKAGE = Path(__file__).parent.parent
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # installed; in a checkout


def shipped_configs() -> list[Path]:
    """The configurations that come with the package."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return [] if folder is None else sorted(folder.rglob("*.yaml"))


def shipped_names() -> list[str]:
    """What they are called: a task, or size/small to be put on top of one."""
    paths = shipped_configs()
    return sorted(path.stem if path.parent.name == "configs" else f"{path.parent.name}/{path.stem}" for path in paths)


def find_config(name: str) -> str:
    """A path as it is if it exists, else the shipped configuration of that name.

    Raises:
        UsageError: If there is neither, or it is a file that holds no settings.

    Example:
        >>> Path(find_config("post_ln")).name
        'post_ln.yaml'
    """
    if Path(name).exists():
        _check_settings(Path(name))
        return name
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    for path in shipped_configs():
        if wanted in (path.stem, f"{path.parent.name}/{path.stem}"):
            return str(path)
    names = ", ".join(shipped_names())
    raise UsageError(f"there is no configuration file {name}, and none of that name is shipped; shipped are: {names}")


def _check_settings(path: Path) -> None:
    """The parser's own error would not say in which file."""
    if not path.is_file():  # a pipe can be read once
        return
    try:
        with path.open("rb") as file:
            settings = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise UsageError(f"{path} {found}; expected are keys and values, such as trainer: {{max_steps: 100}}")


def with_config(
    words: list[str],
    find_run: Callable[[Path, str | None], RunFolder],
    read: Callable[[Path, str | None, str], dict[str, Any]],
) -> list[str]:
    """The command line with every ``--config`` found, or with the one that applies when none is given.

    That is, for a run that goes on, the run's own; for the evaluation of a checkpoint, the one it was trained with;
    otherwise ``configs/default.yaml``.

    Args:
        words: The command line.
        find_run: The run of a name, or without a name the newest.
        read: The contents of a checkpoint, from the folder of all runs, the name of a run, and last, best or a file.
    """
    command, *rest = words
    if "-h" in rest or "--help" in rest:
        return words
    given = False
    for i, word in enumerate(rest):
        if word in ("-c", "--config") and i + 1 < len(rest):
            rest[i + 1], given = find_config(rest[i + 1]), True
        elif word.startswith("--config="):
            rest[i], given = f"--config={find_config(word.removeprefix('--config='))}", True
    if given:
        return [command, *rest]
    checkpoint, name = _value(words, "--ckpt_path"), _value(words, "--run")
    root = Path(_value(words, "--trainer.default_root_dir") or "runs")
    config: str | Path = find_config("default")
    if checkpoint is not None and command != "fit":
        config = _config_of(read(root, name, checkpoint), checkpoint)
    elif checkpoint in ("last", "best"):
        config = find_run(root, name).config
    elif checkpoint and name and (own := RunFolder(root / name)).owns(checkpoint):
        config = own.config
    return [command, "--config", str(config), *rest]


def _config_of(checkpoint: dict[str, Any], name: str) -> Path:
    """What to evaluate a checkpoint with: its model, data and precision, not its devices, limits or callbacks."""
    config = checkpoint.get("config")
    if config is None:
        raise UsageError(f"{name} does not hold its configuration; give it by --config")
    kept = {key: config[key] for key in ("model", "data", "seed_everything")}
    kept["trainer"] = {"precision": config["trainer"]["precision"]}
    saved = checkpoint.get("hyper_parameters", {})
    if saved.get("architecture") is not None:  # of Hugging Face, whose folder may be gone
        kept["model"]["init_args"] |= {"path": None, "architecture": saved["architecture"], "lora": saved.get("lora")}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(kept, file)
    path = Path(file.name)
    atexit.register(path.unlink, missing_ok=True)
    return path


def _value(words: list[str], flag: str) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
