"""Where the ranks of a start meet, and the proof that all of them are of the same one.

Two runs of one allocation that listen at one address would exchange each other's gradients without a word. So the first
thing that passes between ranks, before any process group exists, is who they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.start.errors import LaunchError, NotNow
from parallel.start.launcher import Launch

_KEY = "hope/who"


def meet(launch: Launch, who: Mapping[str, str], timeout_s: float) -> dist.Store:
    """The store that all ranks of this start share. Collective.

    `who`: what is equal on all ranks of a start, and differs between starts; see `parallel.start.launcher.attempt`.

    Raises:
        NotNow: rank 0 cannot listen, since another program does.
        LaunchError: rank 0 is of another start; the message says which two met.
    """
    place = f"{launch.address}:{launch.port}"
    limit = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous(f"tcp://{place}", launch.rank, launch.world_size, timeout=limit))
    except dist.DistNetworkError as error:
        if launch.rank or "EADDRINUSE" not in str(error):
            raise
        raise NotNow(f"rank 0 cannot listen at {place}: another run or program does; {_ADVICE}") from error
    store.set_timeout(limit)
    own = said({**who, "world": str(launch.world_size)})
    if launch.rank == 0:
        store.set(_KEY, own)
    there = store.get(_KEY).decode()
    if there != own:
        raise LaunchError(f"two runs meet at {place}:\n  rank {launch.rank}: {own}\n  rank 0: {there}\n  {_ADVICE}")
    return store


_ADVICE = "give each run a MASTER_PORT of its own, or a job of its own"


def of_run(folder: Path, config: Any) -> dict[str, str]:
    """What tells a run from others of one start: its folder, and a hash of its configuration, a dataclass."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)
    return {"folder": str(folder), "configuration": hashlib.sha256(text.encode()).hexdigest()[:12]}


def said(who: Mapping[str, str]) -> str:
    """One line: `job 7, step 1, ...`."""
    return ", ".join(f"{key} {value}" for key, value in who.items())
