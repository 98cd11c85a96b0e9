"""The one error of generation that a user can mend."""


class GenerationError(ValueError):
    """A request that cannot work; the message names the option or file and what would work."""
