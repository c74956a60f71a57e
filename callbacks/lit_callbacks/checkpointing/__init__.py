"""Checkpoints that are whole, verified, and found again."""

from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.atomic_checkpoint_io import AtomicCheckpointIO, load_verified, local
from lit_callbacks.checkpointing.background_checkpoint_io import BackgroundCheckpointIO
from lit_callbacks.checkpointing.export import export_weights, load_exported
from lit_callbacks.checkpointing.manifest import Manifest, verify
from lit_callbacks.checkpointing.resume import ResumePoint, newest_checkpoint
from lit_callbacks.checkpointing.shelf import committed

__all__ = [
    "AtomicCheckpointIO",
    "BackgroundCheckpointIO",
    "CheckpointError",
    "Manifest",
    "ResumePoint",
    "committed",
    "export_weights",
    "load_exported",
    "load_verified",
    "local",
    "newest_checkpoint",
    "verify",
]
