"""What a step did to every parameter group of the whole model, for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hope.optim.dmgd import Dmgd
from parallel.optimizer.members import Member, name_of


def counted_rows(members: Sequence[Member], device: torch.device) -> Tensor:
    """1 for a tensor that this rank counts in sums over the whole model, else 0."""
    return torch.tensor([float(member.counted) for member in members], dtype=torch.float64, device=device)


def group_statistics(
    optimizers: Sequence[Dmgd], names: Sequence[str], counted: Mapping[Tensor, Tensor], device: torch.device
) -> dict[str, float]:
    """Numbers per group, the same on every rank; collective over all ranks, one small all-reduce.

    `names`: all groups of the whole model. `counted`: of a parameter of an optimizer, `counted_rows` of its tensors.

    Of every group `clock.<name>`; of one that the last step moved and watched also `momentum_norm`, the L2 norm of its
    memory; `update_ratio`, |update| / |weights|; `inner_loss_before` and `inner_loss_after` the write, of the memory
    per squared unit of gradient (l2: 1/2 says that it knew nothing).
    """
    # sums of memory^2, update^2, weight^2, gradient^2 and the two losses; clock; ranks that have the group
    table = torch.zeros(len(names), 8, dtype=torch.float64, device=device)
    for optimizer in optimizers:
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
