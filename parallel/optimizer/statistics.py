"""What a step did to every parameter group of the whole model, for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hope.optim.clocks import ClockedOptimizer
from parallel.optimizer.members import Member, name_of


def counted_rows(members: Sequence[Member], device: torch.device) -> Tensor:
    """[tensors], float64: 1 for a tensor that this rank counts in sums over the whole model, else 0."""
    return torch.tensor([float(member.counted) for member in members], dtype=torch.float64, device=device)


def group_statistics(
    optimizer: ClockedOptimizer, names: Sequence[str], counted: Mapping[Tensor, Tensor], device: torch.device
) -> dict[str, float]:
    """Numbers per group, the same on every rank. Collective over all ranks, one small all-reduce.

    Args:
        optimizer: after its step. What it `measured` is summed over ranks.
        names: all groups of the whole model, the same on every rank. Each is a group of the optimizer on some rank.
        counted: for every parameter of the optimizer, `counted_rows` of its tensors.
        device: where the all-reduce takes its numbers from.

    Returns:
        `clock.<name>` of every group, in steps. Of a group whose last due step was watched also
        `momentum_norm.<name>`, the L2 norm of its memory in units of the gradient, and `update_ratio.<name>`,
        |update| / |weights|. Of one with gradients also `inner_loss_before.<name>` and `inner_loss_after.<name>` the
        write, the memory's inner objective per squared unit of gradient (l2: 1/2 says that it knew nothing).
    """
    # sums of memory^2, update^2, weight^2, gradient^2 and the two losses; clock; ranks that have the group
    table = torch.zeros(len(names), 8, dtype=torch.float64, device=device)
    for number, group in enumerate(optimizer.param_groups):
        row = list(names).index(name_of(group, number))
        table[row, 6] += group["clock"]
        table[row, 7] += 1
        for p in group["params"]:
            if p in optimizer.measured:
                table[row, :6] += counted[p] @ optimizer.measured[p]
    dist.all_reduce(table)
    found: dict[str, float] = {}
    for name, row_ in zip(names, table.tolist(), strict=True):
        memory, update, weight, gradient, before, after, clock, ranks = row_
        found[f"clock.{name}"] = round(clock / ranks)
        if weight > 0:
            found[f"momentum_norm.{name}"] = memory**0.5
            found[f"update_ratio.{name}"] = (update / weight) ** 0.5
        if gradient > 0:
            found[f"inner_loss_before.{name}"] = before / gradient
            found[f"inner_loss_after.{name}"] = after / gradient
    return found
