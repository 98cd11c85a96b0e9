"""Gradients of CMS levels between their due steps, when they stay on their device (`optim.accumulate: local`).

A level with period C is then communicated once in C steps, as a sum, for 4 bytes per weight of the level. The sums are
what this rank's own micro-batches gave: neither averaged over data-parallel ranks nor added up over tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.optim.clocks import ClockedOptimizer
from parallel.optimizer.partitions import Partitions
from parallel.start.groups import Ranks, data_group

Combine = Callable[[Callable[[nn.Parameter], Tensor | None]], None]


def due_groups(optimizer: torch.optim.Optimizer) -> list[int]:
    """Numbers of the groups that move in the coming step; all of them if the optimizer knows no clocks."""
    groups = list(enumerate(optimizer.param_groups))
    if not isinstance(optimizer, ClockedOptimizer):
        return [number for number, _ in groups]
    return [number for number, group in groups if optimizer.due(group)]


class LocalSums:
    """Sums of unreduced gradients over the steps of a period, one flat fp32 buffer per level with a longer clock.

    Args:
        parameters: of every group, in the order of its flat buffer.
        combine: adds up over tensor ranks what the plan says; gets a function from parameter to its sum or None.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: list[list[nn.Parameter]], partitions: Partitions,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self._optimizer, self._partitions, self._ranks = optimizer, partitions, ranks
        self.combine: Combine = lambda sums: None
        self._sums: dict[int, Tensor] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._parameters = parameters
        self._included = self._dirty = False
        for number, group in enumerate(optimizer.param_groups):
            group["gathered"] = self._local(group)
            if group["gathered"]:
                flat = torch.zeros(partitions.masters[number].numel() * ranks.dp_size, device=ranks.device)
                sizes = [p.numel() for p in parameters[number]]
                parts = flat[: sum(sizes)].split(sizes)
                self._sums[number] = flat
                self._views[number] = [v.view_as(p) for v, p in zip(parts, parameters[number], strict=True)]

    def _local(self, group: dict[str, Any]) -> bool:
        optimizer = self._optimizer
        local = isinstance(optimizer, ClockedOptimizer) and optimizer.config.accumulate == "local"
        return local and group["period"] > 1

    def waiting(self) -> list[int]:
        """Groups whose gradients this step does not communicate."""
        due = due_groups(self._optimizer)
        return [number for number in self._sums if number not in due]

    def include(self) -> None:
        """Add a due level's sums to what this step has accumulated; the first call of a step does it."""
        if self._included:
            return
        for number in set(self._sums) & set(due_groups(self._optimizer)):
            gradients = self._partitions.unreduced(number)
            torch._foreach_add_(gradients, [v.view_as(g) for v, g in self._pairs(number, gradients)])
        self._included = True

    def keep(self) -> None:
        """This step counts: a waiting level's gradients go into its sums, a due one's sums start anew."""
        waiting = self.waiting()
        for number in self._sums:
            if number in waiting:
                gradients = self._partitions.unreduced(number)
                pairs = self._pairs(number, gradients)
                torch._foreach_add_([v for v, _ in pairs], [g.view_as(v) for v, g in pairs])
                self._dirty = True
            else:
                self._sums[number].zero_()

    def forget(self) -> None:
        """This step's gradients are gone, the sums before it are not."""
        self._included = False

    def flush(self) -> None:
        """Move the sums into the optimizer's sharded accumulators, for a checkpoint that any layout can read.

        Collective over all ranks. What the level's update will be changes by rounding only.
        """
        if not self._dirty:
            return
        self._dirty = False
        known = {p: v for n in self._sums for p, v in zip(self._parameters[n], self._views[n], strict=True)}
        self.combine(known.get)
        for number, flat in self._sums.items():
            dist.all_reduce(flat, group=data_group())
            own = flat.chunk(self._ranks.dp_size)[self._ranks.dp_rank] / self._ranks.dp_size
            assert isinstance(self._optimizer, ClockedOptimizer)
            self._optimizer.states([self._partitions.masters[number]], "accumulator")[0].add_(own)
            flat.zero_()

    def _pairs(self, number: int, gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._views[number], gradients, strict=True))
