"""Types of numbers and files of a command line, for argparse: what cannot be used is refused with what would work."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from hope.pipe import in_words
from hope.train.written import check_replaceable

LARGEST = 2**63 - 1
"""Of any whole number: what tensors and files are indexed with."""
LARGEST_SIZE = 2**24
"""Of devices, and of what shapes are made of: shapes of a few such sizes can still be counted, and be refused."""
MOST = 2**31 - 1
"""Of steps, tokens, examples and seeds."""
_SHOWN = 40  # characters of a word that is no number


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`."""

    def number(word: str) -> int:
        try:
            found = int(word)
        except ValueError:
            found = least - 1
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{_short(word)} is no whole number from {least:,} to {most:,}")
        return found

    return number


count = whole(1, LARGEST_SIZE)
"""The type of a number of devices, nodes or parts, and of a size."""


def finite(word: str) -> float:
    """A number that is neither infinite nor none, as a type."""
    try:
        found = float(word)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{_short(word)} is no finite number, such as 0.5 or 3e-4")
    return found


def named(word: str) -> str:
    """A word that names something, as a type: an empty one would be the current folder, which nobody asked for."""
    if not word:
        raise argparse.ArgumentTypeError("'' names nothing; give a name, or . for the current folder")
    return word


def result_file(word: str) -> Path:
    """A file that is to be written, whole, when there are results: what cannot be one is refused before they are."""
    path = Path(word)
    try:
        check_replaceable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{in_words(error)}; give the name of a file") from None
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    return path


def _short(word: str) -> str:
    return repr(word if len(word) <= _SHOWN else f"{word[:_SHOWN]}...")
