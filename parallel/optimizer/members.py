"""Who is in the optimizer: every parameter of this rank, its place in the whole model, and whether it counts here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from hope.model import Model
from hope.optim.clocks import ClockedOptimizer

Counts = Callable[[str, nn.Parameter], bool]
"""Of a parameter's name and itself: whether this rank counts it in sums over the whole model."""


@dataclass(frozen=True)
class Member:
    """A parameter of an optimizer group."""

    index: int
    """Its position among all parameters of this rank's model chunks."""
    name: str
    """Its name in the whole model on a single device."""
    numel: int
    """Elements of this tensor rank's shard."""
    order: tuple[int, int]
    """Sorts the parameters of the whole model, over pipeline ranks: (first block of its chunk, position in it)."""
    counted: bool
    """Whether this rank counts its elements in sums over the whole model."""


def name_of(group: dict[str, Any], number: int) -> str:
    """A parameter group's name, else its number."""
    return str(group.get("name", f"group{number}"))


def union_of_names(optimizer: ClockedOptimizer) -> list[str]:
    """Names of the parameter groups of all ranks, in the same order on every rank. Collective.

    Raises:
        ValueError: two groups share a name.
    """
    own = [name_of(group, number) for number, group in enumerate(optimizer.param_groups)]
    if len(set(own)) != len(own):
        raise ValueError(f"parameter groups share a name: {own}")
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return list(dict.fromkeys(name for names in everybody for name in names))


def first_name(own: list[tuple[tuple[int, int], str]]) -> str | None:
    """The name with the lowest place among all ranks' (place, name), the same on every rank. Collective.

    None if no rank has any. A place is `Member.order`.
    """
    firsts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, min(own, default=None))
    found = min((first for first in firsts if first is not None), default=None)
    return None if found is None else found[1]


_ALIGNED = 8
"""Numbers of bf16 in 16 bytes."""


def drop_empty_groups(optimizer: ClockedOptimizer) -> None:
    """Remove groups without parameters: DeepSpeed cannot flatten nothing."""
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def put_odd_sizes_last(optimizer: ClockedOptimizer) -> None:
    """In every group, parameters that would move those behind them off a multiple of 16 bytes in bf16.

    DeepSpeed makes parameters views of one flat buffer per group. A bias of 3 heads in front of a norm is enough to
    make torch.compile's kernels fail (misaligned address), and those of matrix products slow.
    """
    for group in optimizer.param_groups:
        order = sorted(range(len(group["params"])), key=lambda i: group["params"][i].numel() % _ALIGNED != 0)
        for key in ("params", "names"):
            if key in group:
                group[key] = [group[key][i] for i in order]


def counts_everything(chunks: Sequence[nn.Module]) -> Counts:
    """All parameters, except a tied embedding's copy beside the head of a last pipeline stage."""
    copies = {
        parameter
        for chunk in chunks
        if isinstance(chunk, Model) and not chunk.has_embedding and hasattr(chunk, "embedding")
        for parameter in chunk.embedding.parameters()
    }
    return lambda name, parameter: parameter not in copies


def members_of(chunks: Sequence[nn.Module], optimizer: ClockedOptimizer, counts: Counts) -> list[list[Member]]:
    """The members of every parameter group, in the order of its parameters. Checks the groups on the way.

    Args:
        chunks: this rank's part of the model, one per virtual stage.
        optimizer: over parameters of them.
        counts: what `Member.counted` becomes.

    Raises:
        ValueError: two chunks share a name, or a group holds a parameter that is frozen or not in the model.
    """
    known: dict[nn.Parameter, Member] = {}
    for chunk in chunks:
        first = chunk.part.first if isinstance(chunk, Model) else 0
        for position, (name, parameter) in enumerate(chunk.named_parameters()):
            counted = counts(name, parameter)
            known[parameter] = Member(len(known), name, parameter.numel(), (first, position), counted)
    names = [member.name for member in known.values()]
    if len(set(names)) != len(names):
        raise ValueError(f"two model chunks share the parameter {max(names, key=names.count)}")
    members = []
    for number, group in enumerate(optimizer.param_groups):
        name = name_of(group, number)
        strangers = [p for p in group["params"] if p not in known]
        if strangers:
            raise ValueError(f"group {name!r} has {len(strangers)} parameters not in the model")
        frozen = [known[p].name for p in group["params"] if not p.requires_grad]
        if frozen:
            raise ValueError(f"group {name!r} has frozen parameters: {frozen[:3]}")
        members.append([known[p] for p in group["params"]])
    return members
