"""States that are carried from step to step (`data.documents: stream`) in a checkpoint: by lane, a sequence of the
global batch, so that a run may go on with other data-parallel ranks, micro-batches and stages.

What a head's state is made of lies differently in every tensor-parallel shard: these go on with as many tensor ranks.
`stream/RANKofRANKS/blocks.I/NUMBER` holds tensor NUMBER of block I's state [lanes, ...], and `numbers` in its place
the whole numbers of that state and the shapes of its tensors, the same for every lane.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hope.block import BlockState
from hope.model import Model, States
from hope.stored.manifest import Manifest
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.format.planner import Part
from parallel.compute.stream import CarriedStates, leaves, pattern, rewritten
from parallel.start.groups import Ranks

PREFIX = "stream/"
SAVED = "carried from step to step (data.documents: stream), one state for every sequence of the global batch"


@dataclass(frozen=True)
class Stream:
    """The carried states of a rank, and what their sizes follow from.

    lanes: sequences of the global batch. sequence: whether tensor ranks divide the tokens between blocks.
    """

    states: CarriedStates
    lanes: int
    micro_batch: int
    seq_len: int
    sequence: bool

    def parts(self, ranks: Ranks) -> list[Part]:
        """What this rank writes, in host memory of its own. Empty tensors are in `numbers` alone."""
        found: list[Part] = []
        for chunk in self.states.kept or []:
            for block in chunk[0]:
                per_micro = [list(leaves(states[block])) for states in chunk]
                name = _name(block, ranks)
                tensors = [column for column in zip(*per_micro, strict=True) if isinstance(column[0], Tensor)]
                for number, column in enumerate(tensors):
                    whole = torch.cat([leaf for leaf in column if isinstance(leaf, Tensor)]).cpu()
                    if whole.numel():
                        found.append(self._part(f"{name}/{number}", whole, ranks))
                numbers = torch.tensor([_numbers(per_micro[0])], dtype=torch.int64)
                found.append(self._part(f"{name}/numbers", numbers.repeat(self.lanes // ranks.dp_size, 1), ranks))
        return found

    def empty(self, content: Manifest, ranks: Ranks) -> list[Part]:
        """Places for what this rank reads.

        Raises:
            CheckpointError: another number of tensor ranks wrote it.
        """
        saved = content.layout.get("tensor", 1)
        if any(name.startswith(PREFIX) for name in content.tensors) and saved != ranks.tp_size:
            raise CheckpointError(
                f"the states of data.documents=stream were saved by parallel.tensor {saved}, this run has "
                f"{ranks.tp_size}; use parallel.tensor={saved} (data, pipeline and micro-batch may be others), or "
                "another run.name, with model.init for these weights and no memory of the stream"
            )
        share, found = self.lanes // ranks.dp_size, []
        own = [f"{_name(int(block), ranks)}/" for model in self.states.models for block in model.blocks]
        for name, entry in content.tensors.items():
            if any(map(name.startswith, own)):
                place = torch.empty(share, *entry.shape[1:], dtype=getattr(torch, entry.dtype))
                found.append(self._part(name, place, ranks))
        return found

    def restore(self, step: int, parts: Sequence[Part], ranks: Ranks) -> None:
        """Go on from what was read into the places; from no state if there is none, since no step was kept. Collective
        over tensor ranks.

        Raises:
            CheckpointError: the states are not those of this model.
        """
        read = {part.name: part for part in parts}
        if not read:
            return
        tensor = ranks.tp_size if self.sequence else 1
        self.states.kept = [self._chunk(model, step, tensor, read, ranks) for model in self.states.models]

    def _chunk(self, model: Model, step: int, tensor: int, read: dict[str, Part], ranks: Ranks) -> list[States]:
        like = pattern(model, self.seq_len, self.micro_batch, step, tensor)
        device = next(model.parameters()).device
        rows = range(0, self.lanes // ranks.dp_size, self.micro_batch)
        return [
            {block: self._state(state, _name(block, ranks), read, row, device) for block, state in like.items()}
            for row in rows
        ]

    def _state(self, like: BlockState, name: str, read: dict[str, Part], row: int, device: torch.device) -> BlockState:
        numbers = iter(read[f"{name}/numbers"].tensor[0].tolist())
        count = itertools.count()

        def fill(leaf: Tensor | int) -> Tensor | int:
            if not isinstance(leaf, Tensor):
                return next(numbers)
            shape = [self.micro_batch, *itertools.islice(numbers, next(numbers))]
            part = read.get(f"{name}/{next(count)}")
            if part is None:
                return leaf.new_empty(shape)
            return part.tensor[row : row + self.micro_batch].to(device, copy=True).view(shape)

        try:
            found = rewritten(like, fill)
        except (StopIteration, RuntimeError) as error:
            raise CheckpointError(f"{name} holds another state than this model's") from error
        if next(numbers, None) is not None:
            raise CheckpointError(f"{name} holds another state than this model's")
        return found

    def _part(self, name: str, tensor: Tensor, ranks: Ranks) -> Part:
        at = (ranks.dp_rank * tensor.shape[0], *[0] * (tensor.ndim - 1))
        return Part(name, (self.lanes, *tensor.shape[1:]), at, tensor.contiguous())


def _name(block: int, ranks: Ranks) -> str:
    return f"{PREFIX}{ranks.tp_rank}of{ranks.tp_size}/blocks.{block}"


def _numbers(found: Sequence[Tensor | int]) -> list[int]:
    """Whole numbers as they are; of a tensor how many dimensions follow the first, and these."""

    def each() -> Iterator[int]:
        for leaf in found:
            yield from (leaf.ndim - 1, *leaf.shape[1:]) if isinstance(leaf, Tensor) else (leaf,)

    return list(each())
