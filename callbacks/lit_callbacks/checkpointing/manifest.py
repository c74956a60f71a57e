"""What makes a checkpoint a checkpoint: a small file beside it, written last, that says what it must contain."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from lit_callbacks.checkpointing._durable import HashedFile, digest, replace_durably
from lit_callbacks.checkpointing._errors import CheckpointError

SUFFIX = ".manifest.json"
_FORMAT = 1


class Content(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Identity and contents of one checkpoint, in ``<checkpoint>.manifest.json``.

    A checkpoint without it was never completed. All that decides which checkpoint a run goes on from is in here;
    the times of files are not used.

    Args:
        step: Optimizer steps made.
        epoch: The epoch under way.
        attempt: Which fit in this folder wrote it, counted from 1. A fit that was started from an older checkpoint on
            purpose is a later attempt: its checkpoints come first, although their steps are lower.
        run: The run it belongs to, through all resumes.
        owner: The callback that keeps and deletes it.
        score: What its owner ranks it by.
        suspect: Why a resume passes over it, or None: it was saved while an anomaly was open.
        files: Contents by name relative to the checkpoint; ``"."`` where it is a single file.
        environment: Versions, strategy and world size it was written with.
    """

    step: int
    epoch: int
    attempt: int
    run: str
    owner: str
    score: float | None
    suspect: str | None
    environment: dict[str, Any]
    files: dict[str, Content] = dataclasses.field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Commit a checkpoint: from here on it counts."""
        facts = {"format": _FORMAT, **dataclasses.asdict(self)}
        facts["files"] = {name: content._asdict() for name, content in self.files.items()}
        text = json.dumps({"sha256": _own_digest(facts), **facts}, indent=1)
        replace_durably(manifest_path(checkpoint), lambda file: _write_text(file, text))


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is.

    Example:
        >>> manifest_path(Path("checkpoints/step=5.ckpt")).name
        'step=5.ckpt.manifest.json'
    """
    return checkpoint.with_name(checkpoint.name + SUFFIX)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    path = manifest_path(checkpoint)
    try:
        facts = json.loads(path.read_bytes())
        expected, form = facts.pop("sha256"), facts.pop("format")
        if expected != _own_digest({"format": form, **facts}) or form != _FORMAT:
            raise ValueError
        files = {name: Content(**content) for name, content in facts.pop("files").items()}
        return Manifest(files=files, **facts)
    except FileNotFoundError:
        raise CheckpointError("it has no manifest: saving it was never completed, or something else wrote it") from None
    except OSError as error:
        raise CheckpointError(f"its manifest cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"its manifest {path.name} is damaged") from None


def contents(checkpoint: Path) -> dict[str, Content]:
    """Sizes and digests of a checkpoint's files, as they are now.

    Cost: reads all of it once.
    """
    if checkpoint.is_dir():
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        return {path.relative_to(checkpoint).as_posix(): Content(*digest(path)) for path in files}
    return {".": Content(*digest(checkpoint))}


def verify(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: Saying what is wrong.

    Cost: reads all of it once, at about 1 GB/s and core; sizes are compared first.
    """
    manifest = read_manifest(checkpoint)
    if not checkpoint.exists():
        raise CheckpointError("its manifest is there, but the file is gone")
    try:
        for name, expected in manifest.files.items():
            size = _part(checkpoint, name).stat().st_size
            if size != expected.bytes:
                raise CheckpointError(f"{_label(name)}it has {size:,} bytes, and had {expected.bytes:,} when saved")
        found = contents(checkpoint)
    except FileNotFoundError as error:
        raise CheckpointError(f"a part of it is gone: {Path(error.filename).name}") from None
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}") from None
    for name, expected in manifest.files.items():
        if found[name] != expected:
            raise CheckpointError(f"{_label(name)}its contents have changed since it was saved (SHA-256 differs)")
    return manifest


def _part(checkpoint: Path, name: str) -> Path:
    return checkpoint if name == "." else checkpoint / name


def _label(name: str) -> str:
    return "" if name == "." else f"{name}: "


def _own_digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write_text(file: HashedFile, text: str) -> None:
    file.write(text.encode())
