"""This rank's share of the master weights and gradients, whichever class DeepSpeed keeps them in.

DeepSpeed 0.19.8 ends in `DeepSpeedZeroOptimizer` for fp32 and in `BF16_Optimizer` for bf16 parameters with fp32
gradient accumulation. Both flatten a parameter group in order, pad it to a multiple of 2 × dp, and cut it into dp
equal partitions; they differ in where gradients lie and in how they step (one call per group, or one for all).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.start.groups import data_group


@dataclass(frozen=True)
class PartitionSlice:
    """The piece of one parameter that lies in this rank's flat partition of a parameter group.

    `partition[start : start + numel]` is `parameter.view(-1)[offset : offset + numel]`.
    """

    name: str
    """The parameter's name in the model."""
    index: int
    """Its position in `model.named_parameters()`, counted over all chunks of this rank."""
    start: int
    """Where the piece begins in the partition, in elements."""
    offset: int
    """Where it begins in the flattened parameter, in elements."""
    numel: int
    """Its elements."""


class Partitions(Protocol):
    """One flat fp32 tensor per parameter group, masters and gradients alike.

    Attributes:
        masters: this rank's partition of the master weights of every group, [N] each.
    """

    masters: list[torch.Tensor]

    def reduce(self, engine: Any, groups: Collection[int]) -> int:
        """Average the accumulated gradients of these groups over data-parallel ranks, a missing one as zero.

        What other groups have accumulated stays in `unreduced`. Returns the bytes handed to the collective.
        """

    def unreduced(self, group: int) -> list[torch.Tensor]:
        """The fp32 gradients accumulated in this step by the parameters of a group, in order; not a reduced group's."""

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The fp32 gradient of a parameter before the reduction, zeros if there was none; None if not optimized."""

    def gradients(self, groups: Collection[int]) -> dict[int, torch.Tensor]:
        """The reduced gradients of these groups' masters, fp32, padding zero. Call it after the reduction."""

    def publish(self, groups: Collection[int]) -> None:
        """Copy the masters of these groups into the parameters and all-gather them."""

    def clear(self) -> None:
        """Forget every gradient."""


class Fp32Partitions(Partitions):
    """Partitions held by `DeepSpeedZeroOptimizer` (runtime/zero/stage_1_and_2.py)."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.single_partition_of_fp32_groups
        self._known = {parameter for group in optimizer.bit16_groups for parameter in group}
        if any(padding for group in optimizer.round_robin_bit16_padding for padding in group):
            raise AssertionError("DeepSpeed padded between parameters although parameter_alignment is off")

    def reduce(self, engine: Any, groups: Collection[int]) -> int:
        waiting = [p for i, group in enumerate(self._optimizer.bit16_groups) if i not in groups for p in group]
        kept = [p.grad for p in waiting]
        for parameter in waiting:
            parameter.grad = None  # DeepSpeed reduces whatever has a gradient
        reduced = [p for i in groups for p in self._optimizer.bit16_groups[i]]
        for parameter in reduced:
            self.accumulated(parameter)
        engine.allreduce_gradients()
        for parameter, gradient in zip(waiting, kept, strict=True):
            parameter.grad = gradient
        return sum(4 * p.numel() for p in reduced)

    def unreduced(self, group: int) -> list[torch.Tensor]:
        return [self._gradient(parameter) for parameter in self._optimizer.bit16_groups[group]]

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._gradient(parameter) if parameter in self._known else None

    @staticmethod
    def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def gradients(self, groups: Collection[int]) -> dict[int, torch.Tensor]:
        flat = {}
        for index, master in enumerate(self.masters):
            pieces = self._optimizer.averaged_gradients[index]
            # The pieces keep whole parameters' gradients alive; the flat copy is all that is needed.
            self._optimizer.averaged_gradients[index] = None
            if index not in groups:
                continue
            flat[index] = torch.cat([piece.reshape(-1) for piece in pieces])
            if flat[index].numel() != master.numel():
                raise AssertionError(f"gradient partition {flat[index].numel()} != master {master.numel()} elements")
        return flat

    def publish(self, groups: Collection[int]) -> None:
        _publish(self._optimizer, self._optimizer.bit16_groups_flat, self._optimizer.parallel_partitioned_bit16_groups,
                 self.masters, groups)  # fmt: skip

    def clear(self) -> None:
        for index in range(len(self.masters)):
            self._optimizer.averaged_gradients[index] = None
            self._optimizer.all_grad_tensors[index] = None
        self._optimizer.zero_grad(set_to_none=True)


class Bf16Partitions(Partitions):
    """Partitions held by `BF16_Optimizer` (runtime/bf16_optimizer.py).

    Its hooks add every bf16 gradient to an fp32 buffer at once and free it, so a missing gradient is zero.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.fp32_groups_flat_partition
        pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        self._buffers = {p: grad for group, grads in pairs for p, grad in zip(group, grads, strict=True)}

    def reduce(self, engine: Any, groups: Collection[int]) -> int:
        """Not DeepSpeed's all-reduce, which moves twice as much: a rank wants the sums of its own partition only.

        The sums replace this rank's gradients in place. Nobody reads the rest of a buffer until it is cleared.
        """
        ranks = dist.get_world_size(data_group())
        flats = [self._optimizer.fp32_groups_gradients_flat[i] for i in groups]
        for flat, own in zip(flats, self.gradients(groups).values(), strict=True):
            if ranks > 1:
                dist.reduce_scatter_tensor(own, flat, group=data_group())
                own.div_(ranks)
        return sum(4 * flat.numel() for flat in flats)

    def unreduced(self, group: int) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_groups_gradients[group])

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        gradient = self._buffers.get(parameter)
        return None if gradient is None else gradient.view_as(parameter)

    def gradients(self, groups: Collection[int]) -> dict[int, torch.Tensor]:
        return {i: self._optimizer.fp32_groups_gradient_flat_partition[i] for i in groups}

    def publish(self, groups: Collection[int]) -> None:
        _publish(self._optimizer, self._optimizer.bf16_groups_flat, self._optimizer.bf16_partitioned_groups,
                 self.masters, groups)  # fmt: skip

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _publish(
    optimizer: Any, flats: Any, partitioned: Any, masters: list[torch.Tensor], groups: Collection[int]
) -> None:
    """DeepSpeed's `update_lp_params` for some groups: those that did not move need no all-gather."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    for i in groups:
        partitioned[i][dist.get_rank(optimizer.real_dp_process_group[i])].data.copy_(masters[i].data)
    all_gather_dp_groups(
        groups_flat=[flats[i] for i in groups],
        partitioned_param_groups=[partitioned[i] for i in groups],
        dp_process_group=[optimizer.real_dp_process_group[i] for i in groups],
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


def partitions_of(optimizer: Any) -> Partitions:
    """The adapter for what `deepspeed.initialize` returned as its optimizer."""
    known: dict[str, Callable[[Any], Partitions]] = {
        "DeepSpeedZeroOptimizer": Fp32Partitions,
        "BF16_Optimizer": Bf16Partitions,
    }
    name = type(optimizer).__name__
    if name not in known:
        raise AssertionError(f"DeepSpeed chose {name}; this code knows {', '.join(known)} (deepspeed 0.19.8)")
    return known[name](optimizer)


def slices_of(group: list[tuple[int, str, int]], partition_numel: int, rank: int) -> list[PartitionSlice]:
    """What of a group lies in partition `rank`; `group` holds (index, name, numel) of its parameters in order."""
    first, last = rank * partition_numel, (rank + 1) * partition_numel
    slices, begin = [], 0
    for index, name, numel in group:
        low, high = max(begin, first), min(begin + numel, last)
        if low < high:
            slices.append(PartitionSlice(name, index, low - first, low - begin, high - low))
        begin += numel
    return slices
