"""Which configuration a command starts from."""

import atexit
import tempfile
from pathlib import Path

import yaml

from lit_transformer.errors import UsageError
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.resume import load_checkpoint

_PACKAGE = Path(__file__).parent.parent
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # installed; in a checkout


def shipped_configs() -> list[Path]:
    """The configurations that come with the package."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return [] if folder is None else sorted(folder.rglob("*.yaml"))


def find_config(name: str) -> str:
    """A path as it is if it exists, else the shipped configuration of that name.

    Raises:
        UsageError: If there is neither.

    Example:
        >>> Path(find_config("post_ln")).name
        'post_ln.yaml'
    """
    if Path(name).exists():
        return name
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    for path in shipped_configs():
        if wanted in (path.stem, f"{path.parent.name}/{path.stem}"):
            return str(path)
    names = ", ".join(path.stem for path in shipped_configs())
    raise UsageError(f"there is no configuration file {name}, and none of that name is shipped; shipped are: {names}")


def with_config(words: list[str]) -> list[str]:
    """The command line with every ``--config`` found, or with the one that applies when none is given.

    That is, for a run that goes on, the run's own; for the evaluation of a checkpoint, the one it was trained with;
    otherwise ``configs/default.yaml``.
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
    return [command, "--config", str(_default_config(command, rest)), *rest]


def _default_config(command: str, words: list[str]) -> str | Path:
    checkpoint, name = _value(words, "--ckpt_path"), _value(words, "--run")
    root = Path(_value(words, "--trainer.default_root_dir") or "runs")
    if command == "fit" and checkpoint and name and (own := RunFolder(root / name)).owns(checkpoint):
        return own.config
    if checkpoint in ("last", "best"):
        run = RunFolder.resume(root, name)
        if command == "fit":
            return run.config
        checkpoint = str(run.last_checkpoint() if checkpoint == "last" else run.best_checkpoint())
    if checkpoint is not None and command != "fit":
        return _config_of(Path(checkpoint))
    return find_config("default")


def _config_of(checkpoint: Path) -> Path:
    """What to evaluate a checkpoint with: its model, data and precision, not its devices, limits or callbacks."""
    config = load_checkpoint(checkpoint).get("config")
    if config is None:
        raise UsageError(f"{checkpoint} does not hold its configuration; give it by --config")
    kept = {key: config[key] for key in ("model", "data", "seed_everything")}
    kept["trainer"] = {"precision": config["trainer"]["precision"]}
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
