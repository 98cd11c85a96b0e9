"""Errors of checkpoints that a user can act on; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or belongs to another model or layout."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written; an older one may serve."""


class SaveError(CheckpointError):
    """A checkpoint that the run cannot do without was not written; the ones before it are intact."""
