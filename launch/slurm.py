"""SLURM's commands, each with a time limit; no accounting needed."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
         "PREEMPTED", "REVOKED")  # fmt: skip
# what SLURM says of a job that it does not know, or that is over: an answer, unlike any other failure
GONE = re.compile(r"Invalid job id|already completing or completed", re.IGNORECASE)

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class SlurmError(Exception):
    """A command of SLURM failed; the message holds what it said."""


class NoRun(SlurmError):
    """What was named is no run, or has none of what was asked for: no matter of SLURM's."""


class NoAnswer(SlurmError):
    """It ran out of time: what it was asked for may have happened or not."""


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
        raise NoAnswer(f"{command[0]} did not answer within {timeout:.0f} s") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout if command[0] != "sbatch" else done.stdout + done.stderr


def dropped(env: Mapping[str, str]) -> Iterator[str]:
    """A note on every option for sbatch in an environment: `call` does not pass them on."""
    for name in sorted(env):
        if name.startswith("SBATCH_") or name == "SLURM_CLUSTERS":
            option = "clusters" if name == "SLURM_CLUSTERS" else name.removeprefix("SBATCH_").lower().replace("_", "-")
            key = option if option in ("partition", "account", "qos", "exclusive") else f"sbatch=[--{option}=...]"
            yield f"{name}={env[name]} of this shell is not used: what a job gets stands in its profile (site.{key})"


def longest(partition: str) -> str | None:
    """MaxTime of a partition, or of several with commas between; of the default one if empty. None if unknown."""
    try:
        lines = call("scontrol", "-o", "show", "partition", timeout=20).splitlines()
    except SlurmError:
        return None
    shown = [{k: v for k, _, v in (word.partition("=") for word in line.split())} for line in lines]
    wanted = [p for p in shown if (p.get("PartitionName") in partition.split(",") if partition
                                   else p.get("Default") == "YES")]  # fmt: skip
    limits = [p["MaxTime"] for p in wanted if seconds(p.get("MaxTime", "")) is not None]
    return max(limits, key=lambda text: seconds(text) or 0, default=None)


def test_only(script: Path, folder: Path) -> str:
    """What `sbatch --test-only` says: when and where the job would start. Raises SlurmError with its refusal."""
    return call("sbatch", "--test-only", str(script), cwd=folder).strip()


def submit(script: Path, folder: Path, *options: str) -> str:
    """Submit a script; the job's id, with `;CLUSTER` where sbatch names one.

    Raises:
        SlurmError: sbatch refuses, or does not answer, and then the job may be queued all the same.
    """
    try:
        out = call("sbatch", "--parsable", *options, str(script), cwd=folder)
    except NoAnswer as error:
        raise SlurmError(
            f"{error}; the job may be queued all the same: look with `squeue --me`, and scancel it"
        ) from None
    numbers = re.findall(r"^(\d+(?:;\S+)?)\s*$", out, re.MULTILINE)  # banners of the site stand before it
    if not numbers:
        raise SlurmError(f"sbatch gave no job id: {out.strip()}")
    return str(numbers[-1])


@dataclass(frozen=True)
class Known:
    """What SLURM says of a job.

    Attributes:
        life: alive, ended, or unknown. Unknown is no answer, and must never be taken for ended.
        facts: state, and where squeue or scontrol has them reason, nodes, start and restarts.
        reason: why it is unknown, in the words of SLURM.
    """

    life: str
    facts: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def ask(job: str) -> Known:
    """Whether a job waits or runs: from squeue, else scontrol, else sacct, whichever answers first."""
    refusals = []
    for question in (_from_squeue, _from_scontrol, _from_sacct):
        try:
            facts = question(job)
        except SlurmError as error:
            if GONE.search(str(error)):  # squeue and scontrol forget ended jobs after MinJobAge, 5 minutes
                return Known("ended")
            refusals.append(str(error))
            continue
        state = facts.get("state", "COMPLETED").split()[0].rstrip("+")
        return Known("ended" if state in ENDED else "alive", facts)
    return Known("unknown", reason="; ".join(refusals))


def _from_squeue(job: str) -> dict[str, str]:
    number, where = _place(job)
    lines = call("squeue", *where, "-h", "-t", "all", "-j", number, "-o", "%T|%r|%N|%S", timeout=20).splitlines()
    rows = [dict(zip(("state", "reason", "nodes", "start"), line.split("|"), strict=False))
            for line in lines if "|" in line]  # fmt: skip
    if not rows:
        return {}
    # of an array, the element that has not ended
    found = next((row for row in rows if row["state"] not in ENDED), rows[-1])
    return {**found, "restarts": fields(job).get("Restarts", "")}


def _from_scontrol(job: str) -> dict[str, str]:
    shown = _shown(job)
    found = next((row for row in shown if row.get("JobState") not in ENDED), shown[-1])
    return {"state": found["JobState"], "restarts": found.get("Restarts", "")}


def _from_sacct(job: str) -> dict[str, str]:
    number, where = _place(job)
    states = call("sacct", *where, "-n", "-X", "-P", "-j", number, "-o", "State", timeout=20).splitlines()
    if not states:  # it may record jobs late, or those of another cluster
        raise SlurmError(f"sacct has no record of job {job}")
    return {"state": next((state for state in states if state.split()[0] not in ENDED), states[-1])}


def _shown(job: str) -> list[dict[str, str]]:
    """Name=value of `scontrol show job`, one dict per element of an array."""
    number, where = _place(job)
    lines = call("scontrol", *where, "-o", "show", "job", number, timeout=20).splitlines()
    rows = [{k: v for k, _, v in (word.partition("=") for word in line.split())} for line in lines]
    rows = [row for row in rows if "JobState" in row]
    if not rows:
        raise SlurmError(f"scontrol shows nothing of job {job}")
    return rows


def fields(job: str) -> dict[str, str]:
    """Name=value of `scontrol show job`; {} if it gives none."""
    try:
        return _shown(job)[0]
    except SlurmError:
        return {}


def live(job: str) -> bool:
    """Whether the job waits or runs.

    Raises:
        SlurmError: SLURM does not say.
    """
    known = ask(job)
    if known.life == "unknown":
        raise SlurmError(f"SLURM does not say whether job {job} is over: {known.reason}")
    return known.life == "alive"


def newest_live(jobs: Sequence[str]) -> str | None:
    """The job of a run that waits or runs, else None. A run has one job at a time; of a chain also its successor.

    Raises:
        SlurmError: SLURM does not say of one, and then another job must not be started beside it.
    """
    return next((job for job in reversed(jobs[-2:]) if live(job)), None)


def cancel(job: str) -> bool:
    """End a job, its array and its steps; False if it was over already.

    Raises:
        SlurmError: it may still run.
    """
    number, where = _place(job)
    try:
        call("scancel", *where, number)
    except SlurmError as error:
        if GONE.search(str(error)):
            return False
        raise
    return True


def _place(job: str) -> tuple[str, list[str]]:
    """The number of a job, and the options that name its cluster, which sbatch adds as `;NAME`."""
    number, _, cluster = job.partition(";")
    return number, ["-M", cluster] if cluster else []


def seconds(limit: str) -> float | None:
    """Seconds of SLURM's MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; infinite for UNLIMITED; else None."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
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
