"""The error of a checkpoint that cannot be trusted, read or written."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, torn, changed, unreadable or refused. The message says which, why, and what to do."""
