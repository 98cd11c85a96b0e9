"""Whole matrices on their owners: how a matrix optimizer (Muon, M3) is sharded.

Every matrix of a parameter group has one owner among data x tensor ranks, which holds its fp32 master and its optimizer
states, whole. Per due step and group: a reduce-scatter of gradient shards over the data ranks, an exchange of shards
among the tensor ranks of the owner's replica, the update, and both ways back. DeepSpeed takes no part in it: its
partitions cut across matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout.plan import Layout, layout_of
from parallel.optimizer.assignment import Assignment, Place, assign
from parallel.optimizer.members import Member
from parallel.start.groups import Ranks, data_group, tensor_group


class OwnedGroup:
    """The matrices of one parameter group.

    Args:
        parameters, members: of the group on this rank, in order; parameters are this tensor rank's shards.

    Attributes:
        masters: whole fp32 matrices that this rank owns, as parameters for an optimizer; `names[i]` is `masters[i]`'s.
        buffer: [data, tensor, slot] fp32, the gradients accumulated in this step; `views[i]` is parameter i's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], members: Sequence[Member], ranks: Ranks) -> None:
        self.parameters, self.members, self.ranks = list(parameters), list(members), ranks
        self.layouts = [layout_of(p, member.name) for p, member in zip(parameters, members, strict=True)]
        shards = [tuple(p.shape) for p in parameters]
        wholes = [_whole_shape(s, layout, ranks.tp_size) for s, layout in zip(shards, self.layouts, strict=True)]
        self.assignment: Assignment = assign(shards, wholes, ranks.dp_size, ranks.tp_size)
        places = self.assignment.places
        self.buffer = torch.zeros(ranks.dp_size, ranks.tp_size, self.assignment.slot, device=ranks.device)
        self.views = [self.buffer[place.owner][_span(place)].view(place.shape) for place in places]
        self.mine = self.assignment.owned(ranks.dp_rank, ranks.tp_rank)
        with torch.no_grad():
            shards_of_replica = self._shards([p.detach().float() for p in parameters])
        self.masters = [nn.Parameter(whole) for whole in self._joined(self._exchange(shards_of_replica))]
        self.names = [self.members[place.number].name for place in self.mine]
        self.received: Tensor | None = None
        self._sums: Tensor | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._accumulate(view))
            for p, view in zip(parameters, self.views, strict=True)
        ]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def hold(self, on: bool) -> None:
        """Whether gradients wait on their rank while the group is not due, in sums beside `buffer`."""
        self._sums = torch.zeros_like(self.buffer) if on else None

    def include(self) -> None:
        """The group is due: add what has waited to the gradients of this step. Once per step."""
        if self._sums is not None:
            self.buffer.add_(self._sums)

    def keep(self, due: bool) -> None:
        """This step counts: sums of a waiting group take its gradients, those of a due one start anew."""
        if self._sums is not None:
            if due:
                self._sums.zero_()
            else:
                self._sums.add_(self.buffer)

    def discard(self) -> None:
        """Forget this step's gradients."""
        self.buffer.zero_()
        self.received = None
        for master in self.masters:
            master.grad = None

    def take_sums(self) -> list[Tensor]:
        """What waits on all ranks for this rank's matrices, averaged over the data ranks; then nothing waits."""
        if self._sums is None:
            return []
        found = self._joined(self._exchange(self._scatter(self._sums)))
        self._sums.zero_()
        return found

    def held_gradients(self) -> list[Tensor]:
        """The gradients of the masters, or what this rank has accumulated if they were not reduced."""
        if self.received is None:
            return [self.buffer]
        return [master.grad for master in self.masters if master.grad is not None]

    def nonfinite(self) -> list[tuple[tuple[int, int], str]]:
        """(place in the model, name) of matrices with an inf or NaN in what this rank holds of their gradient."""
        held = [
            (self.members[place.number], master.grad) for place, master in zip(self.mine, self.masters, strict=True)
        ]
        if self.received is None:
            held = list(zip(self.members, self.views, strict=True))
        return [(m.order, m.name) for m, values in held if values is not None and not torch.isfinite(values).all()]

    @staticmethod
    def _accumulate(view: Tensor) -> Any:
        def hook(parameter: Tensor) -> None:
            view.add_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = None

        return hook

    def reduce(self) -> int:
        """Average `buffer` over the data ranks and give every owner its whole gradients, as `masters[i].grad`.

        `received` [tensor, slot] keeps this rank's shards of what its replica owns. Returns the bytes handed to the
        collective over the data ranks.
        """
        self.received = self._scatter(self.buffer)
        for master, whole in zip(self.masters, self._joined(self._exchange(self.received)), strict=True):
            master.grad = whole
        return self.buffer.numel() * 4 if self.ranks.dp_size > 1 else 0

    def _scatter(self, buffer: Tensor) -> Tensor:
        """[tensor, slot]: the mean over data ranks of this data rank's slots."""
        if self.ranks.dp_size == 1:
            return buffer[0].clone()
        received = torch.empty_like(buffer[0])
        dist.reduce_scatter_tensor(received.view(-1), buffer.view(-1), group=data_group())
        return received.div_(self.ranks.dp_size)

    @torch.no_grad()
    def publish(self) -> None:
        """Set every rank's parameters from the masters."""
        mine = self.master_shards()
        everything = torch.empty_like(self.buffer)
        if self.ranks.dp_size > 1:
            dist.all_gather_into_tensor(everything.view(-1), mine.reshape(-1), group=data_group())
        else:
            everything[0].copy_(mine)
        for parameter, place in zip(self.parameters, self.assignment.places, strict=True):
            parameter.copy_(everything[place.owner][_span(place)].view(place.shape))

    @torch.no_grad()
    def master_shards(self) -> Tensor:
        """[tensor, slot]: this tensor rank's shards of all masters that its data rank owns. Collective over them."""
        out = torch.zeros_like(self.buffer[0])
        for master, place in zip(self.masters, self.mine, strict=True):
            for rank in range(self.ranks.tp_size):
                shard = self.layouts[place.number].cut(master, rank, self.ranks.tp_size)
                out[rank][_span(place)] = shard.reshape(-1)
        return self._exchange(out)

    def pieces(self, shards: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(name, 0, values) of this rank's shards in a [tensor, slot] of what its data rank owns."""
        for place in self.assignment.places:
            if place.owner[0] == self.ranks.dp_rank:
                yield self.members[place.number].name, 0, shards[place.owner[1]][_span(place)]

    def _exchange(self, slots: Tensor) -> Tensor:
        """[tensor, slot]: slot t goes to tensor rank t, and slot t comes from tensor rank t."""
        if self.ranks.tp_size == 1:
            return slots
        received = torch.empty_like(slots)
        dist.all_to_all_single(received, slots.contiguous(), group=tensor_group())
        return received

    def _shards(self, tensors: Sequence[Tensor]) -> Tensor:
        """[tensor, slot] of these shards of all parameters: those that this rank's data rank owns."""
        out = torch.zeros_like(self.buffer[0])
        for tensor, place in zip(tensors, self.assignment.places, strict=True):
            if place.owner[0] == self.ranks.dp_rank:
                out[place.owner[1]][_span(place)] = tensor.reshape(-1)
        return out

    def _joined(self, slots: Tensor) -> list[Tensor]:
        """The whole matrices that this rank owns, from slots of shards, one from every tensor rank."""
        return [
            self.layouts[place.number].join([slot[_span(place)].view(place.shape) for slot in slots]).clone()
            for place in self.mine
        ]


def _span(place: Place) -> slice:
    return slice(place.start, place.start + place.numel)


def _whole_shape(shard: tuple[int, ...], layout: Layout, ranks: int) -> tuple[int, ...]:
    return tuple(size * ranks if dim == layout.dim else size for dim, size in enumerate(shard))
