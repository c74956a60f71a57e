"""Checkpoints that are whole, verified, and found again."""

from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.atomic_checkpoint_io import AtomicCheckpointIO
from lit_callbacks.checkpointing.manifest import Manifest, verify
from lit_callbacks.checkpointing.resume import ResumePoint, newest_checkpoint

__all__ = ["AtomicCheckpointIO", "CheckpointError", "Manifest", "ResumePoint", "newest_checkpoint", "verify"]
