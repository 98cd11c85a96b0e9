"""Commands whose output a reader may stop reading: `... | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

UNREAD = 141  # what a shell shows of a program that SIGPIPE ended


def piped(main: Callable[[], int]) -> int:
    """What `main` returns; 141 without a word when nobody reads its standard output any more."""
    try:
        code = main()
        sys.stdout.flush()  # here, where it can be caught, and not at the interpreter's end
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
