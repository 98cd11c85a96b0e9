"""Who am I: rank and rendezvous from torchrun, srun, or no launcher at all. No torch, no process group."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.start.errors import LaunchError

# Who I am, in the words of torchrun and of MPI's launchers. A job or a program that starts ranks itself must not pass
# on those of the shell that it was started from.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
             "ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCAL")


@dataclass(frozen=True)
class Launch:
    """This process's place in the job, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def from_environment(env: Mapping[str, str]) -> Launch:
    """Read torchrun's variables (RANK ...), else srun's (SLURM_PROCID ...), else start alone.

    Raises:
        LaunchError: a variable that its launcher always sets is missing or not a number; or an MPI launcher started
            several processes, whose variables do not say where they meet.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if _is_srun_task(env):
        return _from_srun(env)
    _refuse_mpi(env)
    return Launch(0, 1, 0, "127.0.0.1", free_port())


def attempt(env: Mapping[str, str]) -> dict[str, str]:
    """What tells this start from every other: SLURM's job, step and restart, and torchrun's run, if it has a name.

    Equal on all ranks of a start: torchrun's own count of restarts may differ between nodes.
    """
    named = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID", "restart": "SLURM_RESTART_COUNT"}
    found = {key: env.get(name, "0" if key == "restart" else "-") for key, name in named.items()}
    run = env.get("TORCHELASTIC_RUN_ID", "none")
    return found if run == "none" else {**found, "torchrun": run}


def without_launchers(env: Mapping[str, str]) -> dict[str, str]:
    """An environment in which no launcher has said who this process is."""
    return {k: v for k, v in env.items() if k not in LAUNCHERS and not k.startswith(LAUNCHER_PREFIXES)}


def free_port() -> int:
    """A TCP port that nobody listens on now, below those that systems give to outgoing connections.

    Port 0 would give one of the latter, which somebody's connection may take before the caller listens on it.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LaunchError("100 random TCP ports between 20000 and 32000 are all in use on 127.0.0.1")


def _number(env: Mapping[str, str], key: str, launcher: str) -> int:
    try:
        return int(env[key])
    except (KeyError, ValueError):
        found = repr(env[key]) if key in env else "unset"
        raise LaunchError(f"{key} is {found}, but {launcher} sets it to a number; start with {launcher}") from None


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    launcher = "torchrun (or unset RANK and WORLD_SIZE to run one process)"
    if "MASTER_ADDR" not in env:
        raise LaunchError(f"RANK or WORLD_SIZE is set but MASTER_ADDR is not; start with {launcher}")
    return Launch(
        rank=_number(env, "RANK", launcher),
        world_size=_number(env, "WORLD_SIZE", launcher),
        local_rank=_number(env, "LOCAL_RANK", launcher),
        address=env["MASTER_ADDR"],
        port=_number(env, "MASTER_PORT", launcher),
    )


# what mpirun, mpiexec and their like set: number of processes, rank, rank on the node
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)


def _refuse_mpi(env: Mapping[str, str]) -> None:
    """Each process would take itself for the whole run, and all would write to one folder."""
    for size, rank, local in _MPI:
        if env.get(size, "1") not in ("", "0", "1"):
            raise LaunchError(
                f"{size} is {env[size]}: an MPI launcher started {env[size]} processes, but RANK and WORLD_SIZE are "
                f"unset; start with torchrun or srun, or set in every process WORLD_SIZE=${size} RANK=${rank} "
                f"LOCAL_RANK=${local} (its number on the node), MASTER_ADDR (host of rank 0) and MASTER_PORT; "
                f"to run one process, unset {size}"
            )


def _is_srun_task(env: Mapping[str, str]) -> bool:
    # An sbatch script itself also has SLURM_PROCID=0 and SLURM_NTASKS=n, but no step: a plain
    # `python` in it is one process and would wait for n-1 peers that nobody starts.
    return "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env)


def _from_srun(env: Mapping[str, str]) -> Launch:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    return Launch(
        rank=_number(env, "SLURM_PROCID", "srun"),
        world_size=_number(env, tasks, "srun"),
        local_rank=_number(env, "SLURM_LOCALID", "srun"),
        address=env.get("MASTER_ADDR") or first_host(nodes),
        port=_number(env, "MASTER_PORT", "srun") if "MASTER_PORT" in env else _port(env),
    )


def _port(env: Mapping[str, str]) -> int:
    """Of a job's step and restart, since jobs share nodes, steps share a job, and a killed start may hold its port.

    A hash: in a sum of these numbers, a job's restarts would be its neighbours' first starts. 15000 to 31999 lies below
    the ports that Linux gives to outgoing connections (32768-60999).
    """
    start = ".".join(attempt(env).values())
    return 15000 + int.from_bytes(hashlib.sha256(start.encode()).digest()[:8]) % 17000


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-07,11],x1` gives `gpu03`, `rack[1-2]node[3-4]` `rack1node3`."""
    first = re.match(r"(?:[^\[\],\s]|\[[^\[\],\s-]+[^\[\]]*\])+", nodelist)
    if first is None:
        raise LaunchError(f"cannot read a host name out of SLURM's node list {nodelist!r}; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
