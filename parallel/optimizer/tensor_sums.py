"""Sums over the whole of every tensor, when its elements lie on several ranks.

Every element counts once: over data-parallel partitions, over tensor-parallel shards, and not twice where ranks hold
copies. Copies get the same result, bit for bit, because all ranks get the result of one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hope.optim.segments import Piece, Segments
from parallel.optimizer.members import Member
from parallel.optimizer.partitions import PartitionSlice
from parallel.start.groups import Ranks


class TensorSums:
    """Adds up a buffer [this rank's tensors, numbers] over the whole model. What `ClockedOptimizer.attach` takes.

    Rows are the members of `groups[0]`, then those of `groups[1]`, and so on. The buffer of all ranks' tensors has
    about 100 KB for a network of 32 weights on each of 300 tensors.

    Args:
        groups: the members of every parameter group on this rank. Making a TensorSums is collective over all ranks.
        ranks: this process's place.
    """

    def __init__(self, groups: Sequence[Sequence[Member]], ranks: Ranks) -> None:
        own = [member for group in groups for member in group]
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, [member.name for member in own])
        names = {name: row for row, name in enumerate(sorted({n for part in everyone for n in part}))}
        self._rows = torch.tensor([names[member.name] for member in own], device=ranks.device, dtype=torch.long)
        self._counted = torch.tensor([float(m.counted) for m in own], device=ranks.device, dtype=torch.float64)
        self._count = len(names)

    def __call__(self, parts: Tensor) -> Tensor:
        """Sums over all ranks that count a tensor, [this rank's tensors, numbers], from their parts of them.

        Collective over all ranks, one all-reduce. `numbers` and the dtype (float64) are the same on all of them.
        """
        whole = parts.new_zeros(self._count, parts.shape[1])
        whole.index_add_(0, self._rows, parts * self._counted[:, None])
        dist.all_reduce(whole)
        return whole[self._rows]


def segments_of(members: Sequence[Member], slices: Sequence[PartitionSlice]) -> Segments:
    """Which of a group's tensors lie where in this rank's partition. Tensors are numbered as in `members`."""
    position = {member.index: number for number, member in enumerate(members)}
    return Segments(len(members), tuple(Piece(position[s.index], s.start, s.numel) for s in slices))
