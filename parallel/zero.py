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

from parallel import engine
from parallel.groups import Ranks
from parallel.members import Counts, counts_everything, drop_empty_groups, members_of, name_of, union_of_names
from parallel.partitions import Slice, partitions_of, slices_of
from parallel.state import StatePiece, inner_states


class ShardedOptimizer:
    """A torch optimizer whose states and fp32 master weights are divided over the data-parallel ranks.

    After construction `optimizer.param_groups[i]["params"]` is ONE flat fp32 tensor: this rank's partition of the
    group. It crosses the boundaries of matrices; `slices[i]` says which piece of which parameter lies where, the
    rest is zero padding. All other keys of a group stay. `optimizer.step()` is called once per step with all groups
    and must multiply its gradients by `group["grad_scale"]`.

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
        whole = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self._engine, wrapped = engine.initialize(whole, optimizer, precision, zero)
        self._partitions = partitions_of(wrapped)
        self._gradients: list[torch.Tensor] | None = None
        self.slices: list[list[Slice]] = [
            slices_of([(m.index, m.name, m.numel) for m in group], master.numel(), ranks.dp_rank)
            for group, master in zip(self._members, self._partitions.masters, strict=True)
        ]

    @property
    def group_names(self) -> list[str]:
        """`group["name"]` of every parameter group on any rank, else its number."""
        return list(self._names)

    def accumulated(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The gradient accumulated over micro-batches and not yet reduced: fp32, this parameter's shape, to be changed
        in place. Zeros if the backward pass did not reach it, so that ranks agree on which collectives follow; None
        for a parameter that is not optimized."""
        return self._partitions.accumulated(parameter)

    def reduce(self) -> None:
        """Average the accumulated gradients over the data-parallel ranks."""
        self._partitions.fill_missing()
        self._engine.allreduce_gradients()
        self._gradients = self._partitions.gradients()

    def grad_norms(self) -> dict[str, float]:
        """L2 norm of the reduced gradient of the whole model per parameter group, the same on every rank.

        Each element counts once over data, tensor and pipeline ranks; padding not.
        """
        total = torch.zeros(len(self._names), dtype=torch.float64, device=self.ranks.device)
        for index, group in enumerate(self._members):
            counted = {member.index for member in group if member.counted}
            for piece, values in self._pieces(index):
                if piece.index in counted:
                    position = self._names.index(name_of(self.optimizer.param_groups[index], index))
                    total[position] += torch.linalg.vector_norm(values, dtype=torch.float64) ** 2
        dist.all_reduce(total)
        return dict(zip(self._names, total.sqrt().tolist(), strict=True))

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter (in the model's order) with an inf or NaN in its reduced gradient.

        Every rank gets the same answer. It looks at every slice and waits for the device: call it only when a
        norm is not finite.
        """
        orders = {member.index: member.order for group in self._members for member in group}
        bad = [
            (orders[piece.index], piece.name)
            for group in range(len(self._members))
            for piece, values in self._pieces(group)
            if not bool(torch.isfinite(values).all())
        ]
        firsts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(firsts, min(bad, default=None))
        found = min((first for first in firsts if first is not None), default=None)
        return None if found is None else found[1]

    def step(self, clip_scale: float = 1.0) -> None:
        """Update the masters from the reduced gradients times `clip_scale`, then all-gather the parameters."""
        gradients = self._reduced()
        for group in self.optimizer.param_groups:
            group["grad_scale"] = clip_scale
        for master, gradient in zip(self._partitions.masters, gradients, strict=True):
            master.grad = gradient
        # Not engine.step(): it computes norms of its own (an all-reduce per group), silently skips a step whose
        # norm is not finite, and calls our optimizer once per group in fp32 but once in bf16.
        self.optimizer.step()
        self._partitions.publish()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients; parameters and optimizer states stay as they are."""
        for master in self._partitions.masters:
            master.grad = None
        self._partitions.clear()
        self._gradients = None

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        """Set every group's learning rate: one number, or a function of the group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr

    def pieces(self) -> Iterator[StatePiece]:
        """Views of this rank's masters and optimizer states, see `parallel.state`; padding is in none of them."""
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
        self._partitions.publish()
        self.discard()

    def gradient_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's reduced gradients; after `reduce`."""
        return self._named(self._reduced())

    def master_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's fp32 master weights."""
        return self._named(self._partitions.masters)

    def _named(self, flats: list[torch.Tensor]) -> Iterator[tuple[str, int, torch.Tensor]]:
        for flat, pieces in zip(flats, self.slices, strict=True):
            for piece in pieces:
                yield piece.name, piece.offset, flat[piece.start : piece.start + piece.numel].detach()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self._engine.destroy()

    def _reduced(self) -> list[torch.Tensor]:
        if self._gradients is None:
            raise RuntimeError("there are no reduced gradients: call reduce() after forward_backward()")
        return self._gradients

    def _pieces(self, group: int) -> Iterator[tuple[Slice, torch.Tensor]]:
        flat = self._reduced()[group]
        for piece in self.slices[group]:
            yield piece, flat[piece.start : piece.start + piece.numel]
