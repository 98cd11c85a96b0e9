"""What a checkpoint sees of a sharded optimizer: flat views into its storage, under single-device names.

Saving reads the views, loading writes into them; neither side knows how the other cuts tensors. Any optimizer that can
give `pieces`, `counters` and `restored` can be saved in one layout and resumed in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from hope.optim.clocks import ClockedOptimizer

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


def inner_states(optimizer: ClockedOptimizer, flat: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an optimizer keeps for the flat parameter `flat` [N], by key: (element-wise states [N], small states
    [tensors, P] of the keys in `optimizer.per_tensor_keys`). All of them are allocated on the way.

    Raises:
        TypeError: a state is neither, so that a checkpoint would lose it.
    """
    optimizer.allocate_states()
    elements, tensors = {}, {}
    for key, value in optimizer.state[flat].items():
        if key in optimizer.per_tensor_keys:
            tensors[key] = value
        elif isinstance(value, Tensor) and value.shape == flat.shape:
            elements[key] = value
        else:
            shown = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"the optimizer's state {key!r} is {shown}, not of the flat parameter's shape {tuple(flat.shape)}: it "
                "belongs in per_tensor_keys, or as clock or updates in the group"
            )
    return elements, tensors
