"""What a checkpoint sees of a sharded optimizer: flat views into its storage, under single-device names.

Saving reads the views, loading writes into them; neither side knows how the other cuts tensors. Any optimizer that can
give `pieces`, `counters` and `restored` can be saved in one layout and resumed in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Scope = Literal["shard", "whole", "tensor"]


@dataclass(frozen=True)
class StatePiece:
    """A 1-D view into optimizer storage.

    key: "master" (the fp32 weights), or the name of a state: "memory", "square", "accumulator", ...
    name: the parameter's single-device name.
    offset: of `values` in the flattened tensor that `scope` means.
    scope: "shard", the tensor-parallel shard that `parallel.plan.layout_of(name)` cuts, one element per element of the
        parameter; "whole", the same but uncut, held by the rank that owns the matrix; "tensor", a small state of a
        shape of its own that belongs to the parameter as a whole, equal on every rank that gives it.
    """

    key: str
    name: str
    offset: int
    values: Tensor
    scope: Scope = "shard"


class ShardedState(Protocol):
    """An optimizer as a checkpoint sees it."""

    def pieces(self) -> Iterator[StatePiece]:
        """All states of this rank, allocated if they were not yet. Padding is in none of them."""

    def counters(self) -> dict[str, dict[str, int]]:
        """Clocks per parameter group name, plain numbers: {"cms1": {"clock": 7, "updates": 1}}; equal on all ranks."""

    def restored(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        """The views have been written: take the clocks, and set the parameters from the masters. Collective."""
