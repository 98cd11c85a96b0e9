"""Errors of starting that a user can act on."""


class LaunchError(RuntimeError):
    """The launcher's variables are missing or contradict each other, or another run is in the way."""


class NotNow(LaunchError):
    """This start failed for a reason that a later one may not meet: a port in use, a disk that is full."""
