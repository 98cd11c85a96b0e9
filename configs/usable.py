"""Values of the right type that no key can mean: no finite number, more than a machine counts, text without a form."""

from __future__ import annotations

import math
import re
from typing import Any

from hope.arguments import LARGEST, LARGEST_SIZE

SIZES = re.compile(r"(model\.(?!cms\.periods)|parallel\.|optim\.(dmgd|muon|m3)\.).*|train\.(global|micro)_batch")


def largest(path: str) -> int:
    """The largest whole number at a path of a run's configuration."""
    return LARGEST_SIZE if SIZES.fullmatch(path) else LARGEST


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
