"""The error of a start that a user can act on; the message says what to do."""


class LaunchError(RuntimeError):
    """The processes were started in a way that cannot form one job."""
