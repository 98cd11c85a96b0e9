"""The one error of evaluating that a user can mend."""


class EvaluationError(Exception):
    """What was asked cannot be evaluated; the message names the file or the option, and what would work."""
