"""DCP planners for boxes of global tensors: what a rank writes, and what it reads, said without process groups.

DCP's own tensors (ShardedTensor, DTensor) tie a shard to a device mesh; a pipeline stage with a tied embedding or a
matrix held by one owner is none. A `Part` says the same in four tuples. The coordinator removes duplicates (replicated
parameters, tied copies), checks that the parts of all ranks cover every tensor without overlap, and merges the clocks.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hope.stored.tensors import narrowed
from parallel.checkpoint.errors import CheckpointError

Counters = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Part:
    """`tensor`, contiguous on the CPU, is the box of `name` with first corner `at`; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...]
    tensor: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.at), self.tensor.shape)


class PartsSavePlanner(DefaultSavePlanner):
    """Saves parts; `counters` are this rank's clocks, which must agree with those of the other ranks."""

    def __init__(self, parts: Sequence[Part], counters: Counters) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {(part.name, part.at): part for part in parts}
        self._counters = {name: dict(group) for name, group in counters.items()}
        if len(self._parts) != len(parts):
            raise ValueError("two parts of this rank have one name and corner")

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(part) for part in self._parts.values()], planner_data=self._counters)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        counters: dict[str, dict[str, int]] = {}
        for rank, plan in enumerate(all_plans):
            for group, own in plan.planner_data.items():
                if counters.setdefault(group, own) != own:
                    raise CheckpointError(
                        f"rank {rank} is at {own} in group {group}, ranks before at {counters[group]}"
                    )
        plans, metadata = super().create_global_plan(all_plans)
        self.metadata = dataclasses.replace(metadata, planner_data=counters)
        return plans, self.metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[index.fqn, tuple(index.offset)].tensor


class PartsLoadPlanner(LoadPlanner):
    """Fills the tensors of parts from whatever chunks were saved."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = {(part.name, part.at): part for part in parts}
        self._metadata = Metadata({})

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for part in self._parts.values():
            saved = self._metadata.state_dict_metadata.get(part.name)
            assert isinstance(saved, TensorStorageMetadata), f"{part.name} was not checked against the manifest"
            found = create_read_items_for_chunk_list(part.name, saved, [part.chunk])
            if sum(math.prod(item.lengths) for item in found) != part.tensor.numel():
                raise CheckpointError(f"the chunks of {part.name} do not cover {part.chunk}")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.offset is not None
        target = self._parts[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].tensor
        return narrowed(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave the place itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor")


def _write_item(part: Part) -> WriteItem:
    data = TensorWriteData(part.chunk, TensorProperties(part.tensor.dtype), torch.Size(part.shape))
    return WriteItem(MetadataIndex(part.name, part.at), WriteItemType.SHARD, tensor_data=data)


__all__ = ["Counters", "Part", "PartsLoadPlanner", "PartsSavePlanner"]
