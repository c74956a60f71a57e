"""The error of a callback that cannot do what it was asked to."""


class SetupError(ValueError):
    """A callback does not fit the run: a glob matches nothing, or a strategy or optimizer is not supported.

    Raised at ``setup`` or when fit, validate or test starts, before anything is trained; it says what to do.
    """
