"""Muon and M3 sharded: whole matrices on their owners, everything else in ZeRO-1's partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.optim.build import build_optimizer
from hope.optim.clocks import Watched
from hope.optim.config import OptimConfig
from hope.optim.levels import counters_of
from parallel.optimizer.checkpoint_views import Scope, StatePiece
from parallel.optimizer.clocks import Combine, due_groups, frozen_groups, waits_locally
from parallel.optimizer.members import Counts, first_name, members_of, union_of_names
from parallel.optimizer.ownership import OwnedGroup
from parallel.optimizer.sharded import ShardedOptimizer, StepStage
from parallel.optimizer.statistics import group_statistics
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start.groups import Ranks


class MatrixZeroOptimizer(ShardedOptimizer):
    """`ShardedOptimizer` of Muon and M3. What the protocol documents is not repeated at the methods here.

    A `ZeroOptimizer`, `rest`, has everything that is no matrix, and keeps the order of a step for both.

    Args: as of `ZeroOptimizer`, but for
        groups: as `hope.optim.levels.parameter_groups` makes them. Those with `matrices` true go to owners.
        config: which optimizer, and its settings.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        groups: Sequence[dict[str, Any]],
        config: OptimConfig,
        precision: str,
        ranks: Ranks,
        *,
        zero: int,
        counts: Counts,
        combine: Combine,
    ) -> None:
        self.ranks = ranks
        everything = build_optimizer([dict(group) for group in groups], config)
        self.group_names = union_of_names(everything)
        members = members_of(models, everything, counts)
        rest = [group for group in groups if not group["matrices"]]
        self.rest = ZeroOptimizer(
            models, build_optimizer(rest, config), precision, ranks, zero=zero, counts=counts, combine=combine
        )
        pairs = [(group, own) for group, own in zip(groups, members, strict=True) if group["matrices"]]
        self.owned = [OwnedGroup(group["params"], own, ranks) for group, own in pairs]
        own_groups = [
            {**group, "params": owned.masters} for (group, _), owned in zip(pairs, self.owned, strict=True)
        ]  # names in the group are of all matrices, `owned.names` of those on this rank
        self.matrices = build_optimizer(own_groups, config, precision)
        self.reduced_bytes = 0
        for group, owned in zip(self.matrices.param_groups, self.owned, strict=True):
            group["gathered"] = waits_locally(self.matrices, group)
            owned.hold(group["gathered"])

    def _waiting(self) -> list[int]:
        due = due_groups(self.matrices)
        groups = enumerate(self.matrices.param_groups)
        held = [number for number, group in groups if group["gathered"] and number not in due]
        return held + frozen_groups(self.matrices)

    def prepare(self) -> None:
        self.rest.prepare()
        for number in due_groups(self.matrices):
            self.owned[number].include()

    def accumulated(self, parameter: nn.Parameter) -> Tensor | None:
        return self.rest.accumulated(parameter)  # None for a matrix: ranks hold no parts of its gradient

    def reduce(self) -> None:
        self.rest.reduce()
        self.reduced_bytes = self.rest.reduced_bytes
        waiting = self._waiting()
        for number, owned in enumerate(self.owned):
            if number not in waiting:
                self.reduced_bytes += owned.reduce()
        self.matrices.complete()

    def grad_norms(self) -> dict[str, float]:
        self.rest.order.require(StepStage.REDUCED, "grad_norms")
        names = self.group_names
        total = torch.zeros(len(names), dtype=torch.float64, device=self.ranks.device)
        due = due_groups(self.matrices)
        for number, (group, owned) in enumerate(zip(self.matrices.param_groups, self.owned, strict=True)):
            factor = self.matrices.gradient_factor(group) if number in due else 0.0
            square = sum(torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in owned.held_gradients())
            total[names.index(group["name"])] += square * factor**2
        dist.all_reduce(total)
        return dict(zip(names, total.sqrt().tolist(), strict=True)) | self.rest.grad_norms()

    def first_nonfinite(self) -> str | None:
        return first_name(self.rest.nonfinite() + [bad for owned in self.owned for bad in owned.nonfinite()])

    def step(self, clip_scale: float = 1.0) -> None:
        self.rest.order.require(StepStage.REDUCED, "step")
        due = due_groups(self.matrices)
        for group in self.matrices.param_groups:
            group["grad_scale"] = clip_scale
        for number, owned in enumerate(self.owned):
            owned.keep(due=number in due)
        self.matrices.step()
        for number in due:
            self.owned[number].publish()
        self.rest.step(clip_scale)
        self._discard_matrices()

    def discard(self) -> None:
        self.rest.discard()
        self._discard_matrices()

    def _discard_matrices(self) -> None:
        self.matrices.discard()
        for owned in self.owned:
            owned.discard()

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        self.rest.set_lr(lr)
        self.matrices.set_lr(lr)

    def watch(self, which: Watched) -> None:
        self.rest.watch(which)
        self.matrices.watch(which)

    def statistics(self) -> dict[str, float]:
        one = torch.ones(1, dtype=torch.float64, device=self.ranks.device)
        counted = {p: one for group in self.matrices.param_groups for p in group["params"]}
        names = [name for name in self.group_names if name not in self.rest.group_names]
        return self.rest.statistics() | group_statistics(self.matrices, names, counted, self.ranks.device)

    def gradient_pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        yield from self.rest.gradient_pieces()
        for owned in self.owned:
            if owned.received is not None:
                yield from owned.pieces(owned.received)

    def master_pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        yield from self.rest.master_pieces()
        for owned in self.owned:
            yield from owned.pieces(owned.master_shards())

    def pieces(self) -> Iterator[StatePiece]:
        yield from self.rest.pieces()
        self._flush()
        self.matrices.allocate_states()
        for group, owned in zip(self.matrices.param_groups, self.owned, strict=True):
            for name, master in zip(owned.names, group["params"], strict=True):
                yield StatePiece("master", name, 0, master.detach().view(-1), "whole")
                for key, value in self.matrices.state[master].items():
                    scope: Scope = "tensor" if key in self.matrices.per_tensor_keys else "whole"
                    yield StatePiece(key, name, 0, value.view(-1), scope)

    def counters(self) -> dict[str, dict[str, int]]:
        own = {g["name"]: {"clock": g["clock"], "updates": g["updates"]} for g in self.matrices.param_groups}
        return self.rest.counters() | own

    def restored(self, counters: Mapping[str, Mapping[str, int]]) -> None:
        self.rest.restored(counters)
        for group in self.matrices.param_groups:
            group.update(counters_of(group["name"], counters))
        for owned in self.owned:
            owned.publish()
        self._discard_matrices()

    def close(self) -> None:
        for owned in self.owned:
            owned.close()
        self.rest.close()

    def _flush(self) -> None:
        """Move what waits on this rank into its owner's accumulator, where a checkpoint finds it. Collective."""
        for owned in self.owned:
            for master, waiting in zip(owned.masters, owned.take_sums(), strict=False):
                self.matrices.states([master], "accumulator")[0].add_(waiting)
