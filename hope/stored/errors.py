"""Errors of stored models that a user can act on; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or belongs to another model or layout."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written; an older one may serve."""


class NothingStored(CheckpointError, FileNotFoundError):
    """A path leads to no run, checkpoint or export."""


class UnfitWeights(CheckpointError, ValueError):
    """Weights that are not what the configuration beside them says, or that this version cannot read."""
