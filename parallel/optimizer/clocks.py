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

from hope.optim.clocks import ClockedOptimizer, frozen
from parallel.optimizer.partitions import Partitions
from parallel.start.groups import Ranks, data_group

Combine = Callable[[Callable[[nn.Parameter], Tensor | None]], None]
"""Adds up over tensor ranks the partial gradients among those that a function from parameter to gradient gives."""


def due_groups(optimizer: ClockedOptimizer) -> list[int]:
    """Numbers of the groups that move in the coming step."""
    return [number for number, group in enumerate(optimizer.param_groups) if optimizer.due(group)]


def waits_locally(optimizer: ClockedOptimizer, group: dict[str, Any]) -> bool:
    """Whether a group's gradients stay on their rank until its due step."""
    return optimizer.config.accumulate == "local" and group["period"] > 1 and not frozen(group)


def frozen_groups(optimizer: ClockedOptimizer) -> list[int]:
    """Numbers of the groups whose gradients nobody needs."""
    return [number for number, group in enumerate(optimizer.param_groups) if frozen(group)]


class LocalSums:
    """Sums of unreduced gradients over the steps of a period, one flat fp32 buffer per level with a longer clock.

    Args:
        parameters: of every group, in the order of its flat buffer.
        combine: adds up over tensor ranks what the plan says, for `flush`.

    Raises:
        ValueError: gradients wait, tensor ranks have parts of them, and `combine` is missing.
    """

    def __init__(
        self,
        optimizer: ClockedOptimizer,
        parameters: list[list[nn.Parameter]],
        partitions: Partitions,
        ranks: Ranks,
        combine: Combine | None,
    ) -> None:
        self._optimizer, self._partitions, self._ranks = optimizer, partitions, ranks
        self._combine: Combine = combine or (lambda sums: None)
        self._sums: dict[int, Tensor] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._parameters = parameters
        self._dirty = False
        for number, group in enumerate(optimizer.param_groups):
            group["gathered"] = waits_locally(optimizer, group)
            if group["gathered"]:
                flat = torch.zeros(partitions.masters[number].numel() * ranks.dp_size, device=ranks.device)
                sizes = [p.numel() for p in parameters[number]]
                parts = flat[: sum(sizes)].split(sizes)
                self._sums[number] = flat
                self._views[number] = [v.view_as(p) for v, p in zip(parts, parameters[number], strict=True)]
        if self._sums and combine is None and ranks.tp_size > 1:
            raise ValueError("tensor parallelism with optim.accumulate=local needs `combine`")

    def waiting(self) -> list[int]:
        """Groups whose gradients this step does not communicate: what waits for its due step, and what is frozen."""
        due = due_groups(self._optimizer)
        return [number for number in self._sums if number not in due] + frozen_groups(self._optimizer)

    def include(self) -> None:
        """Add a due level's sums to what this step has accumulated. Once per step."""
        for number in set(self._sums) & set(due_groups(self._optimizer)):
            gradients = self._partitions.unreduced(number)
            torch._foreach_add_(gradients, [v.view_as(g) for v, g in self._pairs(number, gradients)])

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

    def flush(self) -> None:
        """Move the sums into the optimizer's sharded accumulators, for a checkpoint that any layout can read.

        Collective over all ranks. What the level's update will be changes by rounding only.
        """
        if not self._dirty:
            return
        self._dirty = False
        known = {p: v for n in self._sums for p, v in zip(self._parameters[n], self._views[n], strict=True)}
        self._combine(known.get)
        for number, flat in self._sums.items():
            dist.all_reduce(flat, group=data_group())
            own = flat.chunk(self._ranks.dp_size)[self._ranks.dp_rank] / self._ranks.dp_size
            self._optimizer.states([self._partitions.masters[number]], "accumulator")[0].add_(own)
            flat.zero_()

    def _pairs(self, number: int, gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._views[number], gradients, strict=True))
