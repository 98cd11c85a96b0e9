"""The same run on this machine with torchrun: same folder, same agents, same verdicts, restarts in a loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from launch.folder import PROGRAM
from launch.job import DONE, REQUEUE, begin, end
from launch.placement import SITE, Job, PlannedRun, Request
from launch.plan import plan
from launch.prepare import prepare
from launch.script import render
from parallel.start.launcher import free_port


def local(path: str, overrides: list[str], processes: int, *, dry_run: bool = False) -> int:
    """Run a configuration here; its exit code (0 done, 85 saved on a signal, 93 or 1 given up)."""
    planned = plan(local_request(path, overrides, processes), ask_slurm=False)
    if dry_run:
        print(" ".join(command(planned.job)))
        return 0
    return run_here(planned)


def local_request(path: str, overrides: Sequence[str], processes: int) -> Request:
    """A configuration on this machine, as one node with a rank per process."""
    return Request(path, (*overrides, f"{SITE}tasks_per_node={processes}"), "local")


def command(job: Job, program: str | None = None) -> list[str]:
    """torchrun for one attempt. It must not act on USR1 and TERM itself: the agents below it do."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--max-restarts=0",
                f"--nproc-per-node={job.world}", "--master-addr=127.0.0.1", f"--master-port={free_port()}",
                "--signals-to-handle=SIGHUP", "-m", "launch.agent"]  # fmt: skip
    return [*torchrun, program or str(job.run.code / PROGRAM), str(job.run.config)]


def run_here(planned: PlannedRun, program: str | None = None) -> int:
    """Attempts until a verdict other than requeue, or a signal; the exit code as in `local`."""
    job = planned.job
    prepare(planned, render(job, program))
    stopped: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for process in child:
            os.killpg(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        for restart in range(1000):
            attempt = f"local{os.getpid()}.{restart}"
            code = begin(job.run, attempt, {})
            if code:
                return code
            child[:] = [_start(job, attempt, program)]
            returned = child[0].wait()
            child.clear()
            verdict = end(job.run, attempt, returned, signalled=bool(stopped), in_slurm=False)
            if verdict != REQUEUE or stopped:
                return _code(verdict, stopped)
            time.sleep(1)
        raise AssertionError("the budget ends every chain of restarts")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _code(verdict: str, stopped: list[int]) -> int:
    if verdict == DONE:
        return 0
    return 85 if verdict == REQUEUE and stopped else 93


def _start(job: Job, attempt: str, program: str | None) -> subprocess.Popen[bytes]:
    path = f"{job.run.code}{os.pathsep}{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else job.run.code
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    env |= {"HOPE_RUN": str(job.run.root), "HOPE_CONTROL": str(job.run.attempt(attempt))}
    env.setdefault("OMP_NUM_THREADS", "1")
    # a group of its own, so that a Ctrl-C of the terminal comes once, through pass_on
    return subprocess.Popen(command(job, program), env=env, cwd=job.folder, process_group=0,
                            preexec_fn=_ignore_stop_signals)  # fmt: skip


def _ignore_stop_signals() -> None:
    """In the child, before exec: torchrun inherits this and lives on; the agents install their own handlers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
