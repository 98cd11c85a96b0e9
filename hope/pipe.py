"""How every command ends whose output may be piped (`... | head`) and which a person may interrupt."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

REFUSED, INTERRUPTED = 2, 130
UNREAD = 141  # what a shell shows of a program that SIGPIPE ended


def piped(main: Callable[[], int]) -> int:
    """What `main` returns; without a traceback 141 when nobody reads its standard output any more, 130 at Ctrl-C, and
    2 for a path that the system refuses and nothing in `main` has named."""
    if sys.stdout is None:  # closed from the start, `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        return _flushed(main)
    except BrokenPipeError:
        close_output()
        return UNREAD
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        close_output()
        return REFUSED


def _flushed(main: Callable[[], int]) -> int:
    """Empty standard output behind `main` too, where it can be caught, and not at the interpreter's end."""
    try:
        code = main()
    except SystemExit:  # of argparse, behind --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def in_words(error: Exception) -> str:
    """What an error says; of one that the system gave, its path and the reason, without numbers."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def close_output() -> None:
    """At the end: let go of lines that nobody takes, for which Python would exit with 120 instead of the run's code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
