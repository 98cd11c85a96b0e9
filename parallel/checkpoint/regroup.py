"""ZeRO's flat fragments and whole tensor-parallel shards: who keeps which, and the moves between them.

ZeRO cuts a parameter group's flat buffer into equal parts, so most tensors lie wholly on one data-parallel rank and
only those at the borders move. A tensor goes to the rank that holds most of it, unless that rank has its fair share of
the bytes already: no rank ever holds more than about 1/dp of the state of its tensor and pipeline coordinate. Moves are
point to point on the CPU (gloo), a bucket at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.format.planner import Part
from parallel.layout.plan import layout_of
from parallel.optimizer.checkpoint_views import Scope, StatePiece
from parallel.start.groups import Ranks

_BUCKET_BYTES = 1 << 28  # in flight at a time: 256 MiB


@dataclass(frozen=True)
class Fragment:
    """`numel` elements from `offset` of a flattened unit, held by data-parallel rank `holder` as its piece `number`."""

    holder: int
    number: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Unit:
    """A state of one parameter, as far as this tensor and pipeline coordinate holds it: a box of the global tensor.

    name: KEY/PARAMETER. shape: of the global tensor. at, box: first corner and extent of what is held here.
    owner: the data-parallel rank that writes and reads it whole.
    """

    name: str
    scope: Scope
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: tuple[int, ...]
    box: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    owner: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.box)

    def part(self, tensor: Tensor) -> Part:
        """The unit with its flat values as what the planners take."""
        return Part(self.name, self.shape, self.at, tensor.view(self.box))


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter: its shape, and the dimension that tensor-parallel ranks divide (None: none)."""

    shape: tuple[int, ...]
    dim: int | None


def shards_of(models: nn.Module | Sequence[nn.Module], ranks: Ranks) -> dict[str, Shard]:
    """By name, of every parameter of this rank."""
    chunks = [models] if isinstance(models, nn.Module) else models
    divided = ranks.tp_size > 1
    return {
        name: Shard(tuple(p.shape), layout_of(p, name).dim if divided else None)
        for chunk in chunks
        for name, p in chunk.named_parameters()
    }


def units_of(
    pieces: Sequence[StatePiece], shards: Mapping[str, Shard], ranks: Ranks, group: dist.ProcessGroup
) -> list[Unit]:
    """The units of this rank's tensor and pipeline coordinate, the same list on all its data-parallel ranks. Collective
    over `group`, these ranks.

    `shards`: from `shards_of`.

    Raises:
        CheckpointError: pieces leave a gap, overlap, or disagree on their dtype.
    """
    own = [(p.key, p.name, p.scope, p.values.dtype, p.offset, p.values.numel()) for p in pieces]
    everyone: list[list[tuple]] = [[] for _ in range(ranks.dp_size)]
    dist.all_gather_object(everyone, own, group=group)
    held: dict[tuple[str, str], list[tuple[Scope, torch.dtype, Fragment]]] = {}
    for holder, theirs in enumerate(everyone):
        for number, (key, name, scope, dtype, offset, numel) in enumerate(theirs):
            held.setdefault((key, name), []).append((scope, dtype, Fragment(holder, number, offset, numel)))
    units = [_unit(key, name, found, shards[name], ranks) for (key, name), found in sorted(held.items())]
    return _with_owners(units, ranks.dp_size)


def collect(
    units: Sequence[Unit], pieces: Sequence[StatePiece], ranks: Ranks, group: dist.ProcessGroup
) -> list[tuple[Unit, Tensor]]:
    """The units that this rank owns with their flat values; where one piece is all of it, that piece itself."""
    owned: list[tuple[Unit, Tensor]] = []
    moves = _Moves(ranks, group)
    for unit in units:
        mine = unit.owner == ranks.dp_rank
        if unit.scope == "tensor" or (len(unit.fragments) == 1 and unit.fragments[0].holder == unit.owner):
            if mine:
                owned.append((unit, pieces[unit.fragments[0].number].values))
            continue
        whole = torch.empty(math.prod(unit.box), dtype=unit.dtype) if mine else None
        for fragment in unit.fragments:
            held = pieces[fragment.number].values if fragment.holder == ranks.dp_rank else None
            place = None if whole is None else whole[fragment.offset : fragment.offset + fragment.numel]
            moves.add(fragment.holder, held, unit.owner, place)
        if whole is not None:
            owned.append((unit, whole))
    moves.finish()
    return owned


def distribute(
    owned: Mapping[str, Tensor],
    units: Sequence[Unit],
    pieces: Sequence[StatePiece],
    ranks: Ranks,
    group: dist.ProcessGroup,
) -> None:
    """The way back: write what the owners read (`owned`: flat values by unit name) into all ranks' pieces."""
    moves = _Moves(ranks, group)
    arrived: list[tuple[StatePiece, Tensor]] = []
    for unit in units:
        whole = owned.get(unit.name)
        for fragment in unit.fragments:
            place = None
            if fragment.holder == ranks.dp_rank:
                piece = pieces[fragment.number]
                on_host = piece.values.device.type == "cpu"
                place = piece.values if on_host else torch.empty_like(piece.values, device="cpu")
                arrived.append((piece, place))
            source = None if whole is None else whole[fragment.offset : fragment.offset + fragment.numel]
            moves.add(unit.owner, source, fragment.holder, place)
    moves.finish()
    for piece, values in arrived:
        if values is not piece.values:
            piece.values.copy_(values)


class _Moves:
    """Copies between data-parallel ranks, started as they are added and waited for a bucket at a time.

    All ranks add the same moves in the same order, each with the ends that it holds; what is between others is skipped.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup) -> None:
        self._rank, self._group = ranks.dp_rank, group
        self._pending: list[dist.Work] = []
        self._bytes = 0

    def add(self, source: int, values: Tensor | None, target: int, place: Tensor | None) -> None:
        """Copy `values` on data-parallel rank `source` to `place` on rank `target`."""
        if source == target:
            if values is not None and place is not None:
                place.copy_(values)
            return
        if self._rank == source:
            assert values is not None
            self._start(dist.isend, values.contiguous(), target)
        elif self._rank == target:
            assert place is not None
            self._start(dist.irecv, place, source)

    def finish(self) -> None:
        """Wait for all moves of this rank."""
        for work in self._pending:
            work.wait()
        self._pending, self._bytes = [], 0

    def _start(self, operation: object, tensor: Tensor, other: int) -> None:
        work = operation(tensor, dist.get_global_rank(self._group, other), group=self._group)  # type: ignore[operator]
        self._pending.append(work)
        self._bytes += tensor.numel() * tensor.itemsize
        if self._bytes >= _BUCKET_BYTES:
            self.finish()


def _unit(key: str, name: str, found: list[tuple[Scope, torch.dtype, Fragment]], shard: Shard, ranks: Ranks) -> Unit:
    fragments = sorted((fragment for _, _, fragment in found), key=lambda f: (f.offset, f.holder))
    kinds = {(scope, dtype) for scope, dtype, _ in found}
    if len(kinds) > 1:
        raise CheckpointError(f"{key} of {name} differs in scope or dtype between ranks: {sorted(map(str, kinds))}")
    scope, dtype = kinds.pop()
    if scope == "tensor":  # equal on all that hold it: one is as good as another
        size = (fragments[0].numel,)
        return Unit(f"{key}/{name}", scope, dtype, size, (0,), size, tuple(fragments), fragments[0].holder)
    shape, at, box = _box(shard, scope, ranks)
    end = 0
    for fragment in fragments:
        if fragment.offset != end:
            raise CheckpointError(f"{key} of {name}: elements {end} to {fragment.offset} are on no rank, or on two")
        end += fragment.numel
    if end != math.prod(box):
        raise CheckpointError(f"{key} of {name}: {end} elements on all ranks, but {box} has {math.prod(box)}")
    return Unit(f"{key}/{name}", scope, dtype, shape, at, box, tuple(fragments), owner=-1)


def _box(shard: Shard, scope: Scope, ranks: Ranks) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(whole shape, first corner, extent) of what a piece of `scope` belongs to."""
    dim, shape = shard.dim, shard.shape
    zeros = (0,) * len(shape)
    if dim is None:
        return shape, zeros, shape
    whole = tuple(size * ranks.tp_size if d == dim else size for d, size in enumerate(shape))
    if scope == "whole":
        return whole, zeros, whole
    corner = tuple(size * ranks.tp_rank if d == dim else 0 for d, size in enumerate(shape))
    return whole, corner, shape


def _with_owners(units: list[Unit], dp_size: int) -> list[Unit]:
    """Give every unit the rank that holds most of it, or the emptiest one if that has its share; large units first."""
    load = [0] * dp_size
    total = sum(unit.bytes for unit in units if unit.scope != "tensor")
    share = max(total / dp_size, max((unit.bytes for unit in units), default=0))
    owners: dict[str, int] = {}
    for unit in sorted(units, key=lambda unit: (-unit.bytes, unit.name)):
        if unit.scope == "tensor":
            owners[unit.name] = unit.owner
            continue
        held = [0] * dp_size
        for fragment in unit.fragments:
            held[fragment.holder] += fragment.numel
        most = max(range(dp_size), key=lambda rank: (held[rank], -load[rank]))
        emptiest = min(range(dp_size), key=lambda rank: (load[rank], -held[rank]))
        owners[unit.name] = most if load[most] + unit.bytes <= 1.05 * share else emptiest
        load[owners[unit.name]] += unit.bytes
    return [replace(unit, owner=owners[unit.name]) for unit in units]
