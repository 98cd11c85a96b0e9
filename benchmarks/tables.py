"""Tables of benchmarks, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def spread(values: Iterable[float | None]) -> str:
    """`mean (smallest - largest)` of those that there are, `-` if none."""
    found = [value for value in values if value is not None]
    return f"{statistics.mean(found):.3f} ({min(found):.3f} - {max(found):.3f})" if found else "-"
