"""SLURM's commands, each with a time limit; no accounting needed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class SlurmError(Exception):
    """A command of SLURM failed; the message holds what it said."""


def call(*command: str, timeout: float = 60, cwd: Path | None = None) -> str:
    """Standard output of a command.

    Raises:
        SlurmError: it is not installed, failed, or did not answer in time (squeue waits for ever for a controller).
    """
    # sbatch takes SBATCH_* and SLURM_* for options: a submission from inside a job must not inherit that job's
    env = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SBATCH_"))}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=cwd)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on this machine; submit from a login node, or use `local`") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {timeout:.0f} s") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout if command[0] != "sbatch" else done.stdout + done.stderr


def test_only(script: Path, folder: Path) -> str:
    """What `sbatch --test-only` says: when and where the job would start. Raises SlurmError with its refusal."""
    return call("sbatch", "--test-only", str(script), cwd=folder).strip()


def submit(script: Path, folder: Path, *options: str) -> str:
    """Submit a script; the job's id."""
    out = call("sbatch", "--parsable", *options, str(script), cwd=folder)
    match = re.search(r"^(\d+)(;\S+)?$", out, re.MULTILINE)
    if match is None:
        raise SlurmError(f"sbatch gave no job id: {out.strip()}")
    return match[1]


def state(job: str) -> dict[str, str]:
    """{state, restarts, reason, nodes, start} of a job: from squeue, else scontrol, else sacct; {} if none knows it."""
    try:
        lines = call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T|%r|%N|%S", timeout=20).splitlines()
    except SlurmError:  # it forgets ended jobs after MinJobAge, 5 minutes
        lines = []
    if lines:  # of an array, the element that has not ended
        rows = [dict(zip(("state", "reason", "nodes", "start"), line.split("|"), strict=True)) for line in lines]
        found = next((row for row in rows if row["state"] not in ENDED), rows[-1])
        return {**found, "restarts": fields(job).get("Restarts", "")}
    shown = fields(job)
    if shown:
        return {"state": shown["JobState"], "restarts": shown.get("Restarts", "")}
    try:
        words = call("sacct", "-n", "-X", "-P", "-j", job, "-o", "State", timeout=20).split()
    except SlurmError:
        return {}
    return {"state": words[0]} if words else {}


def fields(job: str) -> dict[str, str]:
    """Name=value of `scontrol show job`; {} if it does not know the job."""
    try:
        shown = call("scontrol", "-o", "show", "job", job, timeout=20).splitlines()[:1]
    except SlurmError:
        return {}
    return {k: v for k, _, v in (word.partition("=") for word in " ".join(shown).split())}


def live(job: str) -> bool:
    """Whether the job waits or runs."""
    known = state(job).get("state")
    return known is not None and known.split()[0] not in ENDED


def newest_live(jobs: Sequence[str]) -> str | None:
    """The last of a run's jobs if it waits or runs, else None: only the last can, a run has one job at a time."""
    return jobs[-1] if jobs and live(jobs[-1]) else None


def cancel(job: str) -> None:
    """End a job, its array and its steps."""
    call("scancel", job)


def seconds(limit: str) -> int | None:
    """Seconds of SLURM's MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; None if it is none of them."""
    match = TIME.fullmatch(limit)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None:
        h, m, s = [*numbers, 0, 0][:3]
        return int(days) * 86400 + h * 3600 + m * 60 + s
    h, m, s = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return h * 3600 + m * 60 + s
