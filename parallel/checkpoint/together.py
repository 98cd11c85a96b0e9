"""The process groups of saving and loading, on the CPU: a background thread may use them while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from hope.sections import Problem
from parallel.checkpoint.errors import CheckpointError, DamagedCheckpoint
from parallel.start.groups import Ranks

T = TypeVar("T")
Said = TypeVar("Said", str, list[Problem])


@dataclass(frozen=True)
class HostGroups:
    """gloo groups of their own, whatever training uses: two threads must not share a group, and NCCL cannot carry what
    lies in host memory. `world`: all ranks; `data`: those of this rank's tensor and pipeline coordinate."""

    world: dist.ProcessGroup
    data: dist.ProcessGroup


def host_groups(ranks: Ranks, timeout_s: float = 7200.0) -> HostGroups:
    """Make the groups. Collective over all ranks; every rank must make all groups, its own and the others'.

    `timeout_s` must be longer than the slowest rank needs for writing its file: the others wait for it.
    """
    limit = timedelta(seconds=timeout_s)
    members: dict[tuple[int, int], list[int]] = {}
    for rank in range(ranks.world_size):
        tensor, pipeline, _ = ranks.dims.coordinates(rank)
        members.setdefault((pipeline, tensor), []).append(rank)
    data = {place: dist.new_group(who, timeout=limit, backend="gloo") for place, who in members.items()}
    world = dist.new_group(timeout=limit, backend="gloo")
    return HostGroups(world, data[ranks.pp_rank, ranks.tp_rank])


def together(work: Callable[[], T], path: Path, group: dist.ProcessGroup) -> T:
    """Run `work` on every rank of `group`; if it fails on one, fail on all (peers would wait in the next collective).

    `work` makes no collective calls, or they fail alike on all that take part in them.

    Raises:
        CheckpointError, or DamagedCheckpoint if that is what it was, with the message of the first rank that failed;
        another exception's gets `path` and the rank in front.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    own: tuple[type[CheckpointError], str] | None = None
    if isinstance(failure, CheckpointError):
        own = (DamagedCheckpoint if isinstance(failure, DamagedCheckpoint) else CheckpointError, str(failure))
    elif failure is not None:
        own = (CheckpointError, f"{path}: rank {dist.get_rank()}: {reason(failure)}")
    everyone: list[tuple[type[CheckpointError], str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    for found in everyone:
        if found is not None:
            kind, message = found
            raise kind(message) from failure
    return result


def first_only(work: Callable[[], T], path: Path, ranks: Ranks, group: dist.ProcessGroup) -> T:
    """What `work` returns on rank 0, on every rank of the world group; fails on all if it fails there."""
    box: list[Any] = [together(work if ranks.rank == 0 else lambda: None, path, group)]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def first_said(own: Said, group: dist.ProcessGroup) -> Said:
    """What the lowest rank of `group` that says something says, on every rank; empty, as `own`, if none does."""
    everyone = [own] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    return next(filter(None, everyone), own)


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
