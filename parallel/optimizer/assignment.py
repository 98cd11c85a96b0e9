"""Which rank owns which matrix, and where its gradient lies in the buffer that goes to the owners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A matrix of a parameter group. `shape`: of one tensor rank's shard; `start`: of that shard in its owner's slot.

    owner: (data rank, tensor rank) that holds the whole matrix and its optimizer states.
    """

    number: int
    shape: tuple[int, ...]
    owner: tuple[int, int]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Assignment:
    """All matrices of a group in slots of equal size, one per owner: a buffer is [data ranks, tensor ranks, slot]."""

    places: tuple[Place, ...]
    data: int
    tensor: int
    slot: int

    def owned(self, data: int, tensor: int) -> list[Place]:
        return [place for place in self.places if place.owner == (data, tensor)]


def cost(shape: Sequence[int]) -> int:
    """Multiply-adds of one Newton-Schulz product of a matrix [n, m] or a stack [H, n, m]: n m min(n, m) each."""
    *stack, n, m = shape
    return math.prod(stack) * n * m * min(n, m)


def assign(shards: Sequence[tuple[int, ...]], wholes: Sequence[tuple[int, ...]], data: int, tensor: int) -> Assignment:
    """Spread matrices over data x tensor owners by cost: greedily, most expensive first, to the least loaded.

    `shards`, `wholes`: shape of every matrix on one tensor rank and altogether. A pure function of its arguments: every
    rank comes to the same assignment.
    """
    loads = {(d, t): (0, 0, d * tensor + t) for d in range(data) for t in range(tensor)}
    owners: dict[int, tuple[int, int]] = {}
    for number in sorted(range(len(wholes)), key=lambda i: (-cost(wholes[i]), i)):
        owner = min(loads, key=loads.__getitem__)
        spent, held, rank = loads[owner]
        loads[owner] = (spent + cost(wholes[number]), held + math.prod(shards[number]), rank)
        owners[number] = owner
    ends = dict.fromkeys(loads, 0)
    places = []
    for number, shape in enumerate(shards):
        owner = owners[number]
        places.append(Place(number, tuple(shape), owner, ends[owner]))
        ends[owner] += math.prod(shape)
    return Assignment(tuple(places), data, tensor, max(ends.values(), default=0))
