"""The one error that data preparation and reading raise for anything a user can mend."""


class DataError(Exception):
    """Data, or a request for data, that cannot work; the message names the file and what would work."""


class PathError(DataError, OSError):
    """A path that the system refuses; still an OSError for callers that take any such file as absent."""
