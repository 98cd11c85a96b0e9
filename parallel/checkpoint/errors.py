"""Errors of checkpoints that a user can act on; the message says what to do. Those of reading are hope's own."""

from hope.stored.errors import CheckpointError, DamagedCheckpoint


class SaveError(CheckpointError):
    """A checkpoint that the run cannot do without was not written; the ones before it are intact."""


__all__ = ["CheckpointError", "DamagedCheckpoint", "SaveError"]
