"""Values of the right type that no key can mean: no finite number, more than a machine counts, text without a form."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

LARGEST = 2**63 - 1
"""Of any whole number: what tensors and files are indexed with."""
LARGEST_SIZE = 2**24
"""Of what shapes are made of. Shapes of a few such sizes can still be counted, in no time, and be refused."""
SIZES = re.compile(r"(model\.(?!cms\.periods)|parallel\.|optim\.(dmgd|muon|m3)\.).*|train\.(global|micro)_batch")


def largest(path: str) -> int:
    """The largest whole number at a path of a run's configuration."""
    return LARGEST_SIZE if SIZES.fullmatch(path) else LARGEST


def count(word: str) -> int:
    """A number of devices, nodes or parts on a command line, for argparse."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; 1 or more works")
    if number > LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"{number:,} is more than there are; at most {LARGEST_SIZE:,} works")
    return number


count.__name__ = "int"  # argparse says `invalid int value`


def unusable(value: Any, most: int = LARGEST) -> tuple[str, str] | None:
    """(what is wrong, what would work) with a value, or with one in a mapping or a list; None: nothing.

    most: the largest whole number.
    """
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for part in parts if (found := unusable(part, most))), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number", "0.1 or 3e-4"
    if isinstance(value, int) and abs(value) > most:
        return f"{value:,} is more than any machine holds", f"at most {most:,}"
    if isinstance(value, str) and (bad := re.search("[\0\ud800-\udfff]", value)):
        return f"{value!r} has {bad[0]!r}, which no path and no UTF-8 text can hold", "leave it out"
    return None
