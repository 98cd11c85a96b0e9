"""ZeRO-1: DeepSpeed averages gradients and owns the partitions, our optimizer updates them.

Gradients are accumulated by `pipeline.forward_backward`; what tensor ranks or tied copies must add up is added in
place through `accumulated`; then per step: `reduce`, `grad_norms`, and either `step` or `discard`. One reduction over
the data-parallel ranks and one all-gather (per parameter group) of this rank's part of the model per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hope.optim.clocks import ClockedOptimizer
from hope.optim.dmgd import Dmgd
from parallel.optimizer import engine
from parallel.optimizer.checkpoint_views import StatePiece, inner_states
from parallel.optimizer.clocks import LocalSums, due_groups
from parallel.optimizer.members import (
    Counts,
    counts_everything,
    drop_empty_groups,
    first_name,
    members_of,
    name_of,
    union_of_names,
)
from parallel.optimizer.partitions import Slice, partitions_of, slices_of
from parallel.optimizer.statistics import counted_rows, group_statistics
from parallel.optimizer.tensor_sums import TensorSums, segments_of
from parallel.start.groups import Ranks


class ShardedOptimizer:
    """A torch optimizer whose states and fp32 master weights are divided over the data-parallel ranks.

    After construction `optimizer.param_groups[i]["params"]` is ONE flat fp32 tensor: this rank's partition of the
    group. It crosses the boundaries of matrices; `slices[i]` says which piece of which parameter lies where, the
    rest is zero padding. All other keys of a group stay. `optimizer.step()` is called once per step with all groups
    and must multiply its gradients by `group["grad_scale"]`. A `ClockedOptimizer` also says which groups are due.

    Attributes:
        reduced_bytes: gradients that the last `reduce` handed to collectives over the data-parallel ranks.
        local: gradients of levels that are not due; set `local.combine` where tensor ranks have partial gradients.

    Args:
        model: the plain model, or this rank's parts of it, one per virtual stage, names unique over them; moved to
            the device, cast to bf16 with precision "bf16" (buffers keep their dtype), and broadcast from
            data-parallel rank 0.
        optimizer: a fresh torch optimizer over parameters of `model`. Groups without parameters (a pipeline stage
            may hold nothing of one) are removed from it.
        precision: "fp32", or "bf16": bf16 parameters, fp32 masters, fp32 gradient accumulation.
        ranks: what `groups.start` gave.
        zero: the ZeRO stage; 1 is the only one in this version.
        counts: `counts(name, parameter)`: whether this rank counts a parameter in norms of the whole model, so that
            each element counts once over tensor and pipeline ranks. Default: all, and the tied copy of the embedding
            on the last stage not; required with tensor parallelism, where the plan knows what is replicated.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        precision: str,
        ranks: Ranks,
        zero: int = 1,
        counts: Counts | None = None,
    ) -> None:
        if counts is None and ranks.tp_size > 1:
            raise ValueError("tensor parallelism needs `counts`: which parameters are replicated over its ranks")
        self.optimizer = optimizer
        self.ranks = ranks
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        self._names = union_of_names(optimizer)  # before empty groups go: others may hold something of them
        drop_empty_groups(optimizer)
        self._members = members_of(chunks, optimizer, counts or counts_everything(chunks))
        parameters = [list(group["params"]) for group in optimizer.param_groups]
        whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self._engine, wrapped = engine.initialize(whole, optimizer, precision, zero)
        self._partitions = partitions_of(wrapped)
        self._gradients: dict[int, torch.Tensor] | None = None
        self.reduced_bytes = 0
        self.local = LocalSums(optimizer, parameters, self._partitions, ranks)
        self._group_of = {p: number for number, group in enumerate(parameters) for p in group}
        self.slices: list[list[Slice]] = [
            slices_of([(m.index, m.name, m.numel) for m in group], master.numel(), ranks.dp_rank)
            for group, master in zip(self._members, self._partitions.masters, strict=True)
        ]
        if isinstance(optimizer, Dmgd):
            optimizer.tensor_sums = TensorSums(self._members, ranks)
            for master, group, slices in zip(self._partitions.masters, self._members, self.slices, strict=True):
                optimizer.segments[master] = segments_of(group, slices)

    @property
    def group_names(self) -> list[str]:
        """`group["name"]` of every parameter group on any rank, else its number."""
        return list(self._names)

    def accumulated(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The gradient accumulated over micro-batches and not yet reduced: fp32, this parameter's shape, to be changed
        in place. Zeros if the backward pass did not reach it, so that ranks agree on which collectives follow; None
        for a parameter that is not optimized, or that this step does not communicate."""
        if self._group_of.get(parameter) in self.local.waiting():
            return None
        self.local.include()
        return self._partitions.accumulated(parameter)

    def reduce(self) -> None:
        """Average the accumulated gradients over the data-parallel ranks; those of a due level over its period."""
        self.local.include()
        waiting = self.local.waiting()
        groups = [number for number in range(len(self._members)) if number not in waiting]
        reduced = self._partitions.reduce(self._engine, groups)
        self.reduced_bytes = reduced if self.ranks.dp_size > 1 else 0
        self._gradients = self._partitions.gradients(groups)
        for number, gradient in self._gradients.items():
            self._partitions.masters[number].grad = gradient
        if isinstance(self.optimizer, ClockedOptimizer):
            self.optimizer.complete()

    def grad_norms(self) -> dict[str, float]:
        """L2 norm of the gradient that the coming step will use, of the whole model per parameter group.

        The same on every rank. Each element counts once over data, tensor and pipeline ranks; padding not. A level
        that is not due has norm 0, or NaN if what it has accumulated in this step is not finite.
        """
        total = torch.zeros(len(self._names), dtype=torch.float64, device=self.ranks.device)
        for index, group in enumerate(self._members):
            counted = {member.index for member in group if member.counted}
            factor = self._norm_factor(index)
            for piece, values in self._pieces(index):
                if piece.index in counted:
                    position = self._names.index(name_of(self.optimizer.param_groups[index], index))
                    total[position] += (torch.linalg.vector_norm(values, dtype=torch.float64) * factor) ** 2
        dist.all_reduce(total)
        return dict(zip(self._names, total.sqrt().tolist(), strict=True))

    def _norm_factor(self, group: int) -> float:
        if group not in due_groups(self.optimizer):
            return 0.0
        if not isinstance(self.optimizer, ClockedOptimizer):
            return 1.0
        return self.optimizer.gradient_factor(self.optimizer.param_groups[group])

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter (in the model's order) with an inf or NaN in its reduced gradient.

        Every rank gets the same answer. It looks at every slice and waits for the device: call it only when a
        norm is not finite.
        """
        return first_name(self.nonfinite())

    def nonfinite(self) -> list[tuple[tuple[int, int], str]]:
        """(place in the model, name) of parameters with an inf or NaN in what this rank holds of their gradient."""
        orders = {member.index: member.order for group in self._members for member in group}
        return [
            (orders[piece.index], piece.name)
            for group in range(len(self._members))
            for piece, values in self._pieces(group)
            if not bool(torch.isfinite(values).all())
        ]

    def step(self, clip_scale: float = 1.0) -> None:
        """Update the masters from the reduced gradients times `clip_scale`, then all-gather the parameters."""
        self._reduced()
        due = due_groups(self.optimizer)
        for group in self.optimizer.param_groups:
            group["grad_scale"] = clip_scale
        self.local.keep()
        # Not engine.step(): it computes norms of its own (an all-reduce per group), silently skips a step whose
        # norm is not finite, and calls our optimizer once per group in fp32 but once in bf16.
        self.optimizer.step()
        self._partitions.publish(due)
        self.discard()

    def discard(self) -> None:
        """Forget the gradients; parameters and optimizer states stay as they are."""
        if isinstance(self.optimizer, ClockedOptimizer):
            self.optimizer.discard()
        for master in self._partitions.masters:
            master.grad = None
        self.local.forget()
        self._partitions.clear()
        self._gradients = None

    def watch(self, on: bool) -> None:
        """Whether the next step collects what `statistics` tells; it costs some passes over the partitions."""
        if isinstance(self.optimizer, Dmgd):
            self.optimizer.watching = on

    def statistics(self) -> dict[str, float]:
        """What the last step did, per group of the whole model; the same on every rank, {} if it was not watched."""
        if not isinstance(self.optimizer, Dmgd):
            return {}
        masters, device = self._partitions.masters, self.ranks.device
        counted = {p: counted_rows(group, device) for p, group in zip(masters, self._members, strict=True)}
        return group_statistics([self.optimizer], self._names, counted, device)

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        """Set every group's learning rate: one number, or a function of the group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr

    def pieces(self) -> Iterator[StatePiece]:
        """Views of this rank's masters and optimizer states, see `parallel.state`; padding is in none of them.

        Collective if a level keeps its gradients on their rank between due steps.
        """
        self.local.flush()
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
        """The clocks of every parameter group on this rank."""
        return {
            name_of(group, number): {key: group[key] for key in ("clock", "updates") if key in group}
            for number, group in enumerate(self.optimizer.param_groups)
        }

    def restored(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        """Take the clocks and set the parameters from the masters, after the views were written. Collective."""
        for number, group in enumerate(self.optimizer.param_groups):
            group.update(counters[name_of(group, number)])
        self._partitions.publish(range(len(self._members)))
        self.discard()

    def gradient_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's reduced gradients; after `reduce`."""
        return self._named(self._reduced())

    def master_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's fp32 master weights."""
        return self._named(dict(enumerate(self._partitions.masters)))

    def _named(self, flats: dict[int, torch.Tensor]) -> Iterator[tuple[str, int, torch.Tensor]]:
        for number, flat in flats.items():
            for piece in self.slices[number]:
                yield piece.name, piece.offset, flat[piece.start : piece.start + piece.numel].detach()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self._engine.destroy()

    def _reduced(self) -> dict[int, torch.Tensor]:
        if self._gradients is None:
            raise RuntimeError("there are no reduced gradients: call reduce() after forward_backward()")
        return self._gradients

    def _pieces(self, group: int) -> Iterator[tuple[Slice, torch.Tensor]]:
        """This rank's reduced gradients of a group, or what it has accumulated of one that this step keeps back."""
        flat = self._reduced().get(group)
        if flat is None:
            for member, values in zip(self._members[group], self._partitions.unreduced(group), strict=True):
                yield Slice(member.name, member.index, 0, 0, member.numel), values
            return
        for piece in self.slices[group]:
            yield piece, flat[piece.start : piece.start + piece.numel]
