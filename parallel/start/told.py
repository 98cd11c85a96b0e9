"""One message for a run, however many ranks come to it."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from parallel.start.launcher import Launch

PATIENCE_S, SKEW_S = 20.0, 3.0
_SAID, _HEARD = "hope/said", "hope/heard"


def once(message: str, launch: Launch | None, met: bool, agreed: bool) -> None:
    """Say for all processes why they end.

    Args:
        launch: None: what this process says concerns no other.
        met: the ranks have process groups.
        agreed: as in `after_meeting`.
    """
    if launch is None:
        _print(message)
    elif met:
        after_meeting(message, launch.rank, agreed)
    else:
        before_meeting(message, launch)


def before_meeting(message: str, launch: Launch) -> None:
    """Print why this process ends before the ranks have met; ranks that would repeat what rank 0 said are silent.

    What only one of them knows, like a file that is missing on its node, is said with its number, after PATIENCE_S.
    """
    if launch.rank == 0:
        _print(message)
    known = False
    if launch.world_size > 1:
        with contextlib.suppress(RuntimeError):  # others are fine, and wait for this one elsewhere
            known = _first_says(message, launch)
    if launch.rank and not known:
        _print(f"rank {launch.rank}: {message}")


def after_meeting(message: str, rank: int, agreed: bool) -> None:
    """Print why this process ends, when the ranks work in step. `agreed`: all of them are about to say the same.

    Else ranks other than 0 wait for SKEW_S: if all fail alike, a launcher ends them with rank 0 before they speak.
    """
    if rank and agreed:
        return
    if rank:
        time.sleep(SKEW_S)
        message = f"rank {rank}: {message}"
    _print(message)


def _first_says(message: str, launch: Launch) -> bool:
    """Whether rank 0 says the same. It stays until all have heard it: the place to ask may end with it."""
    limit, place = timedelta(seconds=PATIENCE_S), f"tcp://{launch.address}:{launch.port}"
    store, _, _ = next(dist.rendezvous(place, launch.rank, launch.world_size, timeout=limit))
    store.set_timeout(limit)
    if launch.rank == 0:
        store.set(_SAID, message)
        store.wait([f"{_HEARD}/{rank}" for rank in range(1, launch.world_size)])
        return True
    same = bool(store.get(_SAID).decode() == message)
    store.set(f"{_HEARD}/{launch.rank}", "yes")
    return same


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
