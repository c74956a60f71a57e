"""Errors that the command line explains in one paragraph."""


class UsageError(ValueError):
    """Something in a configuration, a file or a folder that its owner can put right.

    The message names what was expected, what came, and what to do. The command line prints it as one paragraph,
    without a traceback, and exits with code 2; every other exception keeps its traceback.
    """


class TrainingStopped(RuntimeError):
    """Training was stopped to keep what is good: the weights in memory and on disk are not damaged.

    The command line prints the message and exits with code 3, so that a launcher does not simply start again.
    """
