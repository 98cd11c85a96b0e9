"""ZeRO-1: DeepSpeed owns the partitions and adds up gradients in fp32, our optimizer updates them.

Per step one reduction over the data-parallel ranks, under bf16 one per parameter group, and one all-gather per group of
this rank's part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hope.optim.clocks import ClockedOptimizer, Watched
from hope.optim.levels import counters_of
from parallel.optimizer import engine
from parallel.optimizer.checkpoint_views import StatePiece, inner_states
from parallel.optimizer.clocks import Combine, LocalSums, due_groups
from parallel.optimizer.members import (
    Counts,
    counts_everything,
    drop_empty_groups,
    first_name,
    members_of,
    name_of,
    put_odd_sizes_last,
    union_of_names,
)
from parallel.optimizer.partitions import PartitionSlice, partitions_of, slices_of
from parallel.optimizer.sharded import ShardedOptimizer, StepOrder, StepStage
from parallel.optimizer.statistics import counted_rows, group_statistics
from parallel.optimizer.tensor_sums import TensorSums, segments_of
from parallel.start.groups import Ranks


class ZeroOptimizer(ShardedOptimizer):
    """`ShardedOptimizer` of an element-wise optimizer, with states and masters divided over the data-parallel ranks.

    After construction `optimizer.param_groups[i]["params"]` is ONE flat fp32 tensor: this rank's partition of the
    group. It crosses the boundaries of matrices; `slices[i]` says which piece of which parameter lies where, the
    rest is zero padding. All other keys of a group stay. `optimizer.step()` is called once per step with all groups,
    and is told by `attach` which tensors its partitions are pieces of.

    Attributes:
        slices: per parameter group, what lies in this rank's partition.
        order: how far this step has come.

    Args:
        model: the plain model, or this rank's parts of it, one per virtual stage, names unique over them; moved to
            the device, cast to bf16 with precision "bf16" (buffers keep their dtype), and broadcast from
            data-parallel rank 0.
        optimizer: a fresh one over parameters of `model`. Groups without parameters (a pipeline stage may hold
            nothing of one) are removed from it.
        precision: "fp32", or "bf16": bf16 parameters, fp32 masters, fp32 gradient accumulation.
        ranks: what `groups.start` gave.
        zero: the ZeRO stage; 1 is the only one in this version.
        counts: `counts(name, parameter)`: whether this rank counts a parameter in norms of the whole model, so that
            each element counts once over tensor and pipeline ranks. Default: all, and the tied copy of the embedding
            on the last stage not; required with tensor parallelism, where the plan knows what is replicated.
        combine: adds up partial gradients over tensor ranks. Required with tensor parallelism where gradients wait on
            their rank (`optim.accumulate: local`), because a checkpoint saves their sum.

    Raises:
        ValueError: what tensor parallelism requires is missing, or the groups do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: ClockedOptimizer,
        precision: str,
        ranks: Ranks,
        *,
        zero: int = 1,
        counts: Counts | None = None,
        combine: Combine | None = None,
    ) -> None:
        if counts is None and ranks.tp_size > 1:
            raise ValueError("tensor parallelism needs `counts`: which parameters are replicated over its ranks")
        self.optimizer = optimizer
        self.ranks = ranks
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        self.group_names = union_of_names(optimizer)  # before empty groups go: others may hold something of them
        drop_empty_groups(optimizer)
        put_odd_sizes_last(optimizer)
        self._members = members_of(chunks, optimizer, counts or counts_everything(chunks))
        parameters = [list(group["params"]) for group in optimizer.param_groups]
        whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self._engine, wrapped = engine.initialize(whole, optimizer, precision, zero)
        self._partitions = partitions_of(wrapped)
        self._gradients: dict[int, torch.Tensor] = {}
        self.reduced_bytes = 0
        self.order = StepOrder()
        self._local = LocalSums(optimizer, parameters, self._partitions, ranks, combine)
        self._group_of = {p: number for number, group in enumerate(parameters) for p in group}
        self.slices: list[list[PartitionSlice]] = [
            slices_of([(m.index, m.name, m.numel) for m in group], master.numel(), ranks.dp_rank)
            for group, master in zip(self._members, self._partitions.masters, strict=True)
        ]
        segments = {
            master: segments_of(group, slices)
            for master, group, slices in zip(self._partitions.masters, self._members, self.slices, strict=True)
        }
        optimizer.attach(TensorSums(self._members, ranks), segments)

    def prepare(self) -> None:
        self.order.require(StepStage.ACCUMULATING, "prepare")
        self._local.include()
        self.order.reach(StepStage.PREPARED)

    def accumulated(self, parameter: nn.Parameter) -> torch.Tensor | None:
        self.order.require(StepStage.PREPARED, "accumulated")
        if self._group_of.get(parameter) in self._local.waiting():
            return None
        return self._partitions.accumulated(parameter)

    def reduce(self) -> None:
        self.order.require(StepStage.PREPARED, "reduce")
        waiting = self._local.waiting()
        groups = [number for number in range(len(self._members)) if number not in waiting]
        reduced = self._partitions.reduce(self._engine, groups)
        self.reduced_bytes = reduced if self.ranks.dp_size > 1 else 0
        self._gradients = self._partitions.gradients(groups)
        for number, gradient in self._gradients.items():
            self._partitions.masters[number].grad = gradient
        self.optimizer.complete()
        self.order.reach(StepStage.REDUCED)

    def grad_norms(self) -> dict[str, float]:
        self.order.require(StepStage.REDUCED, "grad_norms")
        total = torch.zeros(len(self.group_names), dtype=torch.float64, device=self.ranks.device)
        for index, group in enumerate(self._members):
            counted = {member.index for member in group if member.counted}
            factor = self._norm_factor(index)
            for piece, values in self._pieces(index):
                if piece.index in counted:
                    position = self.group_names.index(name_of(self.optimizer.param_groups[index], index))
                    total[position] += (torch.linalg.vector_norm(values, dtype=torch.float64) * factor) ** 2
        dist.all_reduce(total)
        return dict(zip(self.group_names, total.sqrt().tolist(), strict=True))

    def _norm_factor(self, group: int) -> float:
        if group not in due_groups(self.optimizer):
            return 0.0
        return self.optimizer.gradient_factor(self.optimizer.param_groups[group])

    def first_nonfinite(self) -> str | None:
        return first_name(self.nonfinite())

    def nonfinite(self) -> list[tuple[tuple[int, int], str]]:
        """(place in the model, name) of parameters with an inf or NaN in what this rank holds of their gradient."""
        self.order.require(StepStage.REDUCED, "first_nonfinite")
        orders = {member.index: member.order for group in self._members for member in group}
        return [
            (orders[piece.index], piece.name)
            for group in range(len(self._members))
            for piece, values in self._pieces(group)
            if not bool(torch.isfinite(values).all())
        ]

    def step(self, clip_scale: float = 1.0) -> None:
        self.order.require(StepStage.REDUCED, "step")
        due = due_groups(self.optimizer)
        for group in self.optimizer.param_groups:
            group["grad_scale"] = clip_scale
        self._local.keep()
        # Not engine.step(): it computes norms of its own (an all-reduce per group), silently skips a step whose
        # norm is not finite, and calls our optimizer once per group in fp32 but once in bf16.
        self.optimizer.step()
        self._partitions.publish(due)
        self.discard()

    def discard(self) -> None:
        self.optimizer.discard()
        for master in self._partitions.masters:
            master.grad = None
        self._partitions.clear()
        self._gradients = {}
        self.order.reach(StepStage.ACCUMULATING)

    def watch(self, which: Watched) -> None:
        self.optimizer.watch(which)

    def statistics(self) -> dict[str, float]:
        masters, device = self._partitions.masters, self.ranks.device
        counted = {p: counted_rows(group, device) for p, group in zip(masters, self._members, strict=True)}
        return group_statistics(self.optimizer, self.group_names, counted, device)

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        self.optimizer.set_lr(lr)

    def pieces(self) -> Iterator[StatePiece]:
        self._local.flush()
        for index, master in enumerate(self._partitions.masters):
            elements, tensors = inner_states(self.optimizer, self.optimizer.param_groups[index]["params"][0])
            for key, flat in {"master": master, **elements}.items():
                for piece in self.slices[index]:
                    yield StatePiece(
                        key, piece.name, piece.offset, flat[piece.start : piece.start + piece.numel].detach()
                    )
            for key, rows in tensors.items():
                for member, row in zip(self._members[index], rows, strict=True):
                    yield StatePiece(key, member.name, 0, row.detach().view(-1), "tensor")

    def counters(self) -> dict[str, dict[str, int]]:
        return {
            name_of(group, number): {key: group[key] for key in ("clock", "updates")}
            for number, group in enumerate(self.optimizer.param_groups)
        }

    def restored(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            group.update(counters_of(name_of(group, number), counters))
        self._partitions.publish(range(len(self._members)))
        self.discard()

    def gradient_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        self.order.require(StepStage.REDUCED, "gradient_pieces")
        return self._named(self._gradients)

    def master_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        return self._named(dict(enumerate(self._partitions.masters)))

    def _named(self, flats: dict[int, torch.Tensor]) -> Iterator[tuple[str, int, torch.Tensor]]:
        for number, flat in flats.items():
            for piece in self.slices[number]:
                yield piece.name, piece.offset, flat[piece.start : piece.start + piece.numel].detach()

    def close(self) -> None:
        self._engine.destroy()

    def _pieces(self, group: int) -> Iterator[tuple[PartitionSlice, torch.Tensor]]:
        """This rank's reduced gradients of a group, or what it has accumulated of one that this step keeps back."""
        flat = self._gradients.get(group)
        if flat is None:
            for member, values in zip(self._members[group], self._partitions.unreduced(group), strict=True):
                yield PartitionSlice(member.name, member.index, 0, 0, member.numel), values
            return
        for piece in self.slices[group]:
            yield piece, flat[piece.start : piece.start + piece.numel]
