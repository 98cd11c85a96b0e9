"""The same run on this machine, one process per rank: same folder, agents and verdicts, restarts in a loop.

The agents are children of this process, so a signal reaches each of them once, and they save and end when this process
is killed. What they print goes to RUN/logs/localPID.out, as under SLURM, and from there to the terminal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from configs.errors import ConfigError
from hope.sections import Problem
from launch.agent import OK, PASSED_ON
from launch.folder import PROGRAM, RunFolder, first, read_json, write_json
from launch.job import CANCELLED, DONE, REQUEUE, begin, end
from launch.placement import SITE, Job, PlannedRun, Request
from launch.plan import plan
from launch.prepare import install, prepare
from launch.slurm import SlurmError
from parallel.start.holders import described, kernel, started
from parallel.start.launcher import free_port, without_launchers

POLL_S = 0.1


@dataclass(frozen=True)
class Ended:
    """How a run here ended: its exit code (see `local`), and whether a signal asked for the end."""

    code: int
    stopped: bool


def local(path: str, overrides: list[str], processes: int, *, dry_run: bool = False) -> int:
    """Run a configuration here; its exit code.

    0 done, or stopped on request (Ctrl-C, the file STOP); 2 configuration or data error; 85 saved on TERM or USR1;
    93 given up.
    """
    planned = plan(local_request(path, overrides, processes), ask_slurm=False)
    if dry_run:
        print(f"{planned.job.world} x {' '.join(command(planned.job))}")
        return 0
    return run_here(planned).code


def local_request(path: str, overrides: Sequence[str], processes: int) -> Request:
    """A configuration on this machine, as one node with a rank per process."""
    return Request(path, (*overrides, f"{SITE}tasks_per_node={processes}"), "local")


def command(job: Job, program: str | None = None) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "launch.agent", program or str(job.run.code / PROGRAM), str(job.run.config)]


def run_here(planned: PlannedRun, program: str | None = None) -> Ended:
    """Attempts until a verdict other than requeue, or a signal. `program` replaces pretrain_hope.py, for tests.

    Raises:
        ConfigError: the run is trained on this machine already; nothing of it has changed.
    """
    job = planned.job
    refuse_held(job.run)
    prepare(planned, None)
    install(job.run)
    log_path = job.run.logs / f"local{os.getpid()}.out"
    with _caught() as signals, _announced(job.run), log_path.open("ab", buffering=0) as log:
        terminal = _Copy(Path(log.name))
        for restart in range(1000):
            attempt = f"local{os.getpid()}.{restart}"
            with _into(log):
                begin(job.run, attempt, {})
            agents = _start(job, attempt, program, log)
            codes = _watch(agents, job.run.attempt(attempt), signals, terminal)
            with _into(log):
                worst = next((code for code in codes if code), 0)
                verdict = end(job.run, attempt, worst, signalled=bool(signals.all), in_slurm=False)
            terminal.show()
            if verdict != REQUEUE or signals.all:
                return Ended(_code(job.run, attempt, verdict), bool(signals.all))
            time.sleep(1)
    raise AssertionError("the budget ends every chain of restarts")


def _code(run: RunFolder, attempt: str, verdict: str) -> int:
    """The exit code of a run whose last attempt got a verdict: what its ranks ended with, where that is an answer."""
    exits = [read_json(path, {}).get("code") for path in (run.attempt(attempt) / "exit").glob("[0-9]*.json")]
    if verdict == DONE or (verdict == CANCELLED and set(exits) == {0}):
        return 0
    return next((code for code in (2, 85) if code in exits), 93)


class _Signals:
    """Those that came, and those of them that the agents have not got yet."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self.waiting: list[int] = []

    def catch(self, number: int, frame: FrameType | None) -> None:
        self.all.append(number)
        self.waiting.append(number)


@contextlib.contextmanager
def _caught() -> Iterator[_Signals]:
    signals = _Signals()
    previous = {number: signal.signal(number, signals.catch) for number in PASSED_ON}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _announced(run: RunFolder) -> Iterator[None]:
    """Say in the run's folder which process to ask for an end."""
    pid = os.getpid()
    facts = {"host": os.uname().nodename, "kernel": kernel(), "pid": pid, "started": started(pid)}
    write_json(run.here, facts)
    try:
        yield
    finally:
        run.here.unlink(missing_ok=True)


def refuse_held(run: RunFolder) -> None:
    """Before its ranks find the folder held, the launch folder of the run that is there would be gone.

    Raises:
        ConfigError: a process of this machine trains it, whoever started that.
    """
    for facts in (read_json(run.here, {}), read_json(run.root / "owner.json", {})):
        if facts and _announced_lives(facts):
            what = f"{run.root} is trained already: {described(facts)}"
            raise ConfigError("this machine", [Problem("run.name", what, f"another one, or `cancel {run.root}` first")])


def _announced_lives(facts: Mapping[str, Any]) -> bool | None:
    """Whether the process of these facts runs; None if that cannot be seen from here."""
    if not isinstance(facts.get("pid"), int):  # no facts of a process
        return False
    ours, theirs = kernel(), str(facts.get("kernel", ""))
    if ours and theirs == ours:
        return bool(started(facts.get("pid")) == facts.get("started"))
    started_anew = facts.get("host") == os.uname().nodename and ours.split(" ")[0] != theirs.split(" ")[0]
    return False if started_anew else None


def interrupt(run: RunFolder) -> str | None:
    """Ask the `launch local` that runs it, if one does, to save and end; what was done.

    Raises:
        SlurmError: it runs on another host.
    """
    facts = read_json(run.here, {})
    if not facts or _announced_lives(facts) is False:
        return None
    if _announced_lives(facts) is None:
        raise SlurmError(f"it runs on {facts.get('host')} as process {facts.get('pid')}: `cancel` it there")
    os.kill(facts["pid"], signal.SIGINT)
    return f"process {facts['pid']} was asked to save and end"


class _Copy:
    """Shows on the terminal what is added to a file."""

    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] | None = path.open("rb")

    def show(self) -> None:
        if self.file is None:
            return
        try:
            sys.stdout.write(self.file.read().decode(errors="replace"))
            sys.stdout.flush()
        except OSError:  # nobody looks any more (`| head`, a closed terminal): the run goes on
            self.file = None


@contextlib.contextmanager
def _into(log: IO[bytes]) -> Iterator[None]:
    """What this process prints goes where its agents print."""
    with (
        open(os.dup(log.fileno()), "w") as text,
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        yield


def _start(job: Job, attempt: str, program: str | None, log: IO[bytes]) -> list[subprocess.Popen[bytes]]:
    """One agent per rank."""
    path = f"{job.run.code}{os.pathsep}{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else job.run.code
    env = {**without_launchers(os.environ), "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    env |= {"HOPE_RUN": str(job.run.root), "HOPE_CONTROL": str(job.run.attempt(attempt))}
    env |= {"WORLD_SIZE": str(job.world), "LOCAL_WORLD_SIZE": str(job.world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port())}  # fmt: skip
    env.setdefault("OMP_NUM_THREADS", "1")
    # groups of their own, so that a Ctrl-C of the terminal comes once, through this process
    return [
        subprocess.Popen(command(job, program), env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=job.folder,
                         stdout=log, stderr=log, process_group=0, preexec_fn=_prepare_agent)
        for rank in range(job.world)
    ]  # fmt: skip


def _prepare_agent() -> None:
    """In the child, before exec: TERM when this process dies, and no signal is lost before the agent has handlers."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)


def _watch(agents: list[subprocess.Popen[bytes]], control: Path, signals: _Signals, terminal: _Copy) -> list[int]:
    """Pass signals on until every agent has ended; their exit codes."""
    while None in [agent.poll() for agent in agents]:  # a list: every one must be asked
        for number in [signals.waiting.pop(0) for _ in list(signals.waiting)]:
            for agent in agents:
                agent.send_signal(number)
        for rank, agent in enumerate(agents):
            lost = agent.returncode not in (None, *OK) and not (control / "exit" / f"{rank:05d}.json").exists()
            if lost:  # nobody but this process can tell the others, which would wait for it
                facts = {"rank": rank, "host": os.uname().nodename, "code": agent.returncode}
                first(control / "failed", facts)
        terminal.show()
        time.sleep(POLL_S)
    return [agent.returncode for agent in agents]
