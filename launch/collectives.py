"""Seconds of a step that ranks spend in collectives: bytes of a ring (parallel/layout/traffic.py) over bandwidths.

Bus bandwidth is counted as nccl-tests does, and as preflight prints it. Sends between pipeline stages are left out:
they are one activation per stage and micro-batch, where tensor parallelism has several per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Config
from launch.profile import BUS_GB_S, Profile
from parallel.layout.memory import StepShape
from parallel.layout.stages import split
from parallel.layout.topology import ParallelConfig, ParallelDims
from parallel.layout.traffic import data_ring_bytes, tensor_ring_bytes


@dataclass(frozen=True)
class Bus:
    """Bus bandwidths in GB/s; 0: not known, and then no time is counted."""

    inside: float = BUS_GB_S
    """Between the ranks of one node."""
    between: float = 0
    """Between nodes, of all ranks of a node together."""
    ranks_per_node: int | None = None
    """None: all ranks are on one node."""

    @staticmethod
    def of(site: Profile) -> Bus:
        """As a site's profile says."""
        return Bus(site.bus_gb_s, site.network_gb_s, site.ranks_per_node)

    def tensor(self, dims: ParallelDims) -> float:
        """Of a group of tensor-parallel ranks, which are neighbours."""
        return self.between if self._leaves(dims.tensor) else self.inside

    def data(self, dims: ParallelDims) -> float:
        """Of a group of data-parallel ranks. As many groups as there are tensor ranks on a node share its network."""
        if not self._leaves(dims.tensor * dims.data):
            return self.inside
        assert self.ranks_per_node is not None
        return self.between / min(dims.tensor, self.ranks_per_node)

    def _leaves(self, ranks: int) -> bool:
        return self.ranks_per_node is not None and ranks > self.ranks_per_node


ONE_NODE = Bus()


@dataclass(frozen=True)
class Collectives:
    """Seconds per step on the stage that moves most."""

    tensor: float
    """Of all micro-batches, without the pipeline's bubble."""
    data: float
    """Once per step."""

    @staticmethod
    def of(config: Config, layout: ParallelConfig, world: int, bus: Bus) -> Collectives:
        """Those of a layout of `world` devices, by the model that the configuration has."""
        dims = layout.dims(world)
        shape = StepShape.of(config.train, layout, dims)
        stages = split(config.model, shape.seq_len, dims.pipeline, dims.virtual_pipeline)
        count = config.train.global_batch // (shape.micro_batch * dims.data)
        tensor = data = 0.0
        if dims.tensor > 1:
            tensor = count * max(tensor_ring_bytes(config.model, parts, shape) for parts in stages)
        if dims.data > 1:
            data = max(data_ring_bytes(config.model, parts, shape, config.optim) for parts in stages)
        return Collectives(_seconds(tensor, bus.tensor(dims)), _seconds(data, bus.data(dims)))

    def step(self, useful: float, bubble: float) -> float:
        """Seconds of a step with `useful` ones of arithmetic per rank; a pipeline waits for its tensor ranks too."""
        return (useful + self.tensor) * (1 + bubble) + self.data


def _seconds(bytes_: float, gb_s: float) -> float:
    return bytes_ / gb_s / 1e9 if gb_s else 0.0
