"""The parallel layout of a run, in plain numbers: no process group, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Problem = tuple[str, str, str]


@dataclass(frozen=True)
class ParallelDims:
    """How `world_size` devices are divided. `data` is what the other degrees leave over.

    Ranks are numbered as megatron-core and DeepSpeed both do: tensor fastest, then context, data, pipeline.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    @property
    def data(self) -> int:
        """Data-parallel degree: the number of model replicas."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


@dataclass
class ParallelConfig:
    """The `parallel` section of a config.

    This version runs data parallel only; the other keys are here so that a config that asks for them is
    refused with a clear message and not silently run in another layout.
    """

    tensor: int = 1
    """Tensor-parallel degree: heads and MLP columns over devices."""
    sequence: bool = False
    """Sequence parallelism: trunk activations divided over the tensor ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    context: int = 1
    """Context-parallel degree: sequence over devices."""
    zero: int = 1
    """ZeRO stage of the optimizer states."""

    def dims(self, world_size: int) -> ParallelDims:
        """The layout on `world_size` devices. Call it after `problems` found none."""
        return ParallelDims(world_size, self.tensor, self.pipeline, self.context)

    def problems(self, world_size: int, global_batch: int, micro_batch: int) -> Iterator[Problem]:
        """Yield (YAML path, what is wrong, what would work) for a run on `world_size` devices.

        `global_batch` and `micro_batch` count sequences: per optimizer step over all devices, and per
        forward pass of one device.
        """
        yield from self._unsupported()
        yield from _batch_problems(world_size, global_batch, micro_batch)

    def _unsupported(self) -> Iterator[Problem]:
        for key in ("tensor", "pipeline", "virtual_pipeline", "context"):
            degree = getattr(self, key)
            if degree != 1:
                yield (f"parallel.{key}", f"is {degree}; this version runs data parallel only", "1")
        if self.sequence:
            wrong = "is true; it divides activations over tensor ranks, and this version runs data parallel only"
            yield ("parallel.sequence", wrong, "false")
        if self.zero != 1:
            wrong = f"is {self.zero}; this version shards optimizer states only (ZeRO stage 1)"
            yield ("parallel.zero", wrong, "1")


def _batch_problems(world_size: int, global_batch: int, micro_batch: int) -> Iterator[Problem]:
    if micro_batch < 1:
        yield ("train.micro_batch", f"is {micro_batch}, but a forward pass needs a sequence", "1 or more")
        return
    unit = micro_batch * world_size
    if global_batch >= unit and global_batch % unit == 0:
        return
    wrong = (
        f"global {global_batch} sequences is not a positive multiple of micro {micro_batch} × dp {world_size} = {unit}"
    )
    below = global_batch // unit * unit
    yield ("train.global_batch", wrong, _batch_advice(below, unit, world_size, global_batch, micro_batch))


def _batch_advice(below: int, unit: int, dp: int, global_batch: int, micro_batch: int) -> str:
    nearest = [str(n) for n in (below, below + unit) if n > 0]
    advice = f"nearest: {', '.join(nearest)}"
    per_rank, rest = divmod(global_batch, dp)
    if rest or per_rank < 1:
        return advice
    fitting = [m for m in range(min(micro_batch, per_rank), 0, -1) if per_rank % m == 0]
    return f"{advice}; or keep {global_batch} with train.micro_batch {fitting[0]}"
