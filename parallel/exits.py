"""How a run ends: its exit codes, and what is said of an error that a user can mend."""

from __future__ import annotations

from configs.errors import ConfigError
from data_prep.errors import DataError
from hope.dense import CannotCompile
from hope.devices import CannotCapture
from parallel.checkpoint.errors import CheckpointError, SaveError
from parallel.start import told
from parallel.start.errors import LaunchError, NotNow
from parallel.start.launcher import Launch

DONE, FAILURE, CONFIG_ERROR, REQUEUE, DO_NOT_RESTART = 0, 1, 2, 85, 93
_BEFORE: dict[type[Exception], str] = {
    ConfigError: "",
    DataError: "data error: ",
    CheckpointError: "checkpoint error: ",
    CannotCompile: "config error: ",
    CannotCapture: "config error: ",
    LaunchError: "launch error: ",
}
"""What stands before the message."""
EXPLAINED = tuple(_BEFORE)
"""Errors whose message says what to do, where a traceback would not."""


def refused(error: Exception, launch: Launch | None, met: bool) -> int:
    """Say once for all ranks why the run ends; the exit code.

    Args:
        error: one of `EXPLAINED`.
        launch: None if that is what failed.
        met: the ranks have process groups.
    """
    text = next(word for known, word in _BEFORE.items() if isinstance(error, known)) + str(error)
    alone = not met and isinstance(error, LaunchError)  # a matter between one rank and its launcher
    of_one = isinstance(error, DataError | CannotCompile | CannotCapture)
    told.once(text, None if alone else launch, met, agreed=not of_one)
    return FAILURE if isinstance(error, SaveError | NotNow) else CONFIG_ERROR
