"""Rows of an evaluation divided over data-parallel ranks, each of which has the whole model."""

from __future__ import annotations

from typing import TypeVar

from hope.evaluate.rows import Values
from parallel.start import groups

T = TypeVar("T")


class RankShare:
    """A `hope.evaluate.rows.Share`: round by round, each rank has one batch."""

    def __init__(self, ranks: groups.Ranks) -> None:
        self.rank, self.size = ranks.dp_rank, ranks.dp_size

    def exchange(self, results: dict[int, Values]) -> dict[int, Values]:
        """The results of all ranks, on every rank. Collective."""
        return groups.merged(results)

    def agree(self, value: T) -> T:
        """What rank 0 says. Collective."""
        found: T = groups.from_first(value)
        return found
