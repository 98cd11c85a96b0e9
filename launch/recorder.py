"""NCCL's flight recorder: what each rank was doing in its collectives when it hung.

torch keeps the last collectives of a process in memory. It writes them when one times out, and when a byte comes
through a pipe: the agent's limits are shorter than NCCL's, so it asks. Read the files with

    python -m torch.distributed.flight_recorder.fr_trace CONTROL/nccl --prefix rank_
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER, PREFIX = "nccl", "rank_"
ENTRIES = 2000
"""Collectives that are kept: about a kilobyte each."""
_FILE, _PIPE = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
_PAUSE_S = 0.1


def switched_on(control: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Variables for a trainer whose attempt has the folder `control`; what `env` has already stays as it is."""
    folder = control / FOLDER
    folder.mkdir(parents=True, exist_ok=True)  # torch makes none
    # the pipe is this host's: not every shared file system has pipes, and where none can be made, torch ends the run
    pipe = Path(tempfile.gettempdir()) / f"hope-nccl-{os.getpid()}-"
    ours = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(ENTRIES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        _FILE: str(folder / PREFIX),
        _PIPE: str(pipe),
    }
    return {name: env.get(name, value) for name, value in ours.items()}


def dump(variables: Mapping[str, str], rank: int, seconds: float) -> Path | None:
    """Ask the trainer of `rank` for its record, and wait up to `seconds`; the file, or None if none came.

    A program without NCCL, as on CPUs, has no pipe and is not waited for.
    """
    target = Path(f"{variables[_FILE]}{rank}")
    try:
        pipe = os.open(f"{variables[_PIPE]}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # none, or nobody reads it
        return target if target.exists() else None
    with os.fdopen(pipe, "wb", buffering=0) as stream:
        stream.write(b"1")
    deadline, size = time.monotonic() + seconds, -1
    while time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        grown = target.stat().st_size if target.exists() else 0
        if grown and grown == size:
            break
        size = grown
    return target if target.exists() else None


def forget(variables: Mapping[str, str], rank: int) -> None:
    """Remove the pipe."""
    Path(f"{variables[_PIPE]}{rank}.pipe").unlink(missing_ok=True)


def found(control: Path) -> Path | None:
    """The folder of an attempt's records, if any rank has written one."""
    return control / FOLDER if any((control / FOLDER).glob(f"{PREFIX}*")) else None
