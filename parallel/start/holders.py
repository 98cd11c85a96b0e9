"""Whether the process that holds a run's folder is alive, from what it wrote about itself. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Life = Literal["alive", "dead", "unknown"]
_RUNS = {"RUNNING", "COMPLETING", "CONFIGURING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING"}


def judge(holder: Mapping[str, Any], own: Mapping[str, Any], silent_s: float, stale_s: float) -> Life:
    """`silent_s`: seconds since the holder's last heartbeat; from `stale_s` on, one that is elsewhere is dead."""
    if own["kernel"] and holder.get("kernel") == own["kernel"]:
        return "alive" if started(holder.get("pid")) == holder.get("started") else "dead"
    job, own_job = holder.get("job", "-"), own["job"]
    if job == own_job != "-" and _number(holder.get("restart")) < _number(own["restart"]):
        return "dead"
    state = _job_state(job) if str(job).isdigit() and job != own_job else ""
    if state == "ENDED":
        return "dead"
    if state in ("STOPPED", "SUSPENDED"):  # it cannot beat, and will go on
        return "alive"
    return "dead" if silent_s >= stale_s else "unknown"


def described(holder: Mapping[str, Any]) -> str:
    """`host n17, pid 4711, job 7, step 0, restart 0, since 2026-01-01 12:00:00`."""
    keys = ("host", "pid", "job", "step", "restart", "since")
    return ", ".join(f"{key} {holder[key]}" for key in keys if holder.get(key, "-") != "-") or "somebody unknown"


def kernel() -> str:
    """What process numbers are counted by: the running kernel and the namespace; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: Any) -> int | None:
    """When a living process began, in clock ticks since the kernel's start; None if there is none, or a zombie.

    A number of a process is given again, together with its start it is not.
    """
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _number(restart: Any) -> int:
    return int(restart) if str(restart).isdigit() else 0


def _job_state(job: str) -> str:
    """SLURM's word for a job that runs, ENDED for one whose processes are gone, empty if SLURM does not say."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    if told.returncode:
        return "ENDED" if "Invalid job id" in told.stderr else ""
    states = set(told.stdout.split()) & _RUNS
    return states.pop() if states else "ENDED"
