"""The error a person can fix."""


class UsageError(ValueError):
    """Something in a configuration, a file or a folder that its owner can put right.

    The message names what was expected, what came, and what to do. The command line prints it as one paragraph,
    without a traceback, and exits with code 2; every other exception keeps its traceback.
    """
