"""One agent per rank: `python -m launch.agent PROGRAM ARGS` starts the trainer and watches it from outside.

The agent lives when the trainer hangs, is stopped or dies. It passes TERM, USR1 and INT on, reads the trainer's
heartbeat from shared memory, writes down how it ended (`exit/RANK.json`), and when any rank has failed or hung ends its
own trainer, with the stacks of all threads in a file. Agents of a job meet only in the attempt's control folder.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from hope.train import heartbeat
from launch import hang, recorder
from launch.folder import append_line, first, read_json, write_json
from parallel.start.launcher import Launch, from_environment

OK = (0, 2, 85, 93)  # ends that the trainer chose: done, config error, requeue, do not restart
HUNG, PEER_FAILED = 86, 87
PAUSE_S, GRACE_S, DUMP_S = 0.1, 3.0, 3.0
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Agent:
    """Starts and watches the trainer of one rank. `control`: the attempt's folder, shared by all ranks."""

    def __init__(self, command: list[str], control: Path, rank: int, world: int) -> None:
        self.control, self.rank, self.world, self.host = control, rank, world, socket.gethostname()
        self.limits = limits_of(control)
        self.poll_s = 1.0 + world / 250  # all agents together look into the shared folder at most 750 times a second
        self.signalled: str | None = None
        self.waiting: list[int] = []  # signals not passed on yet
        self.began = time.monotonic()
        memory, self.stacks = os.memfd_create("heartbeat"), os.memfd_create("stacks")
        os.ftruncate(memory, heartbeat.SIZE)
        self.page = mmap.mmap(memory, heartbeat.SIZE)
        names = {heartbeat.HEARTBEAT: str(memory), heartbeat.STACKS: str(self.stacks)}
        self.recorder = recorder.switched_on(control, os.environ)
        out = self._log_file()
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)  # `launch local` blocks them: one that waits comes now
        self.child = subprocess.Popen(
            command,
            env={**os.environ, **self.recorder, **names},
            pass_fds=(memory, self.stacks),
            stdout=out,
            stderr=out,
            preexec_fn=_prepare_child,
        )

    def _log_file(self) -> IO[bytes] | None:
        """Rank 0 writes to the job's log, the others to files of their own."""
        if self.rank == 0:
            return None
        folder = self.control.parent.parent / "logs" / self.control.name
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"rank-{self.rank:05d}.log").open("ab")

    def _pass_on(self, number: int, frame: object) -> None:
        self.signalled = self.signalled or signal.Signals(number).name.removeprefix("SIG")
        self.waiting.append(number)

    def watch(self) -> int:
        """Wait for the trainer's end, or end it; returns this process's exit code."""
        looked = 0.0
        while (code := self.child.poll()) is None:
            now = time.monotonic()
            if self.waiting and heartbeat.read(self.page).count:  # its handlers are there; before, it ignores signals
                self.child.send_signal(self.waiting.pop(0))
            if now - looked >= self.poll_s:
                looked = now
                if self.signalled is None and (self.control / "USR1").exists():
                    self._pass_on(signal.SIGUSR1, None)
                if (self.control / "hang.json").exists():
                    return self._end_hung()
                if (self.control / "failed").exists():
                    return self._end_after_peer()
                self._check_limit(now)
            time.sleep(PAUSE_S)
        return self._ended(code)

    def _beat(self) -> heartbeat.Beat:
        beat = heartbeat.read(self.page)
        return beat if beat.count else heartbeat.Beat(time=self.began)

    def _check_limit(self, now: float) -> None:
        beat = self._beat()
        limit = self.limits.get(beat.limited_by)
        if limit is not None and now - beat.time > limit:
            found = {"rank": self.rank, "host": self.host, "step": beat.step, "phase": beat.phase, "limit_s": limit}
            first(self.control / "hang.json", {**found, "time": time.time()})

    def _end_hung(self) -> int:
        """Report where this rank stands, dump its stacks, end it; the agent that saw it first names the culprits."""
        beat = self._beat()
        report = {
            "rank": self.rank,
            "host": self.host,
            "pid": self.child.pid,
            "step": beat.step,
            "phase": beat.phase,
            "beats": beat.count,
            "silent_s": round(time.monotonic() - beat.time, 1),
            "state": process_state(self.child.pid),
        }
        # a stopped process must continue to show its stacks, and the ranks that wait for it continue too: judge first
        stopped = report["state"] in ("T", "t")
        if not stopped:
            self._dump_stacks(report)
        write_json(self.control / "reports" / f"{self.rank:05d}.json", report)
        found = read_json(self.control / "hang.json", {})
        if found.get("rank") == self.rank:
            self._judge(found)
        else:
            self._wait_for(self.control / "culprits.json", 3 * self.poll_s + 2 * DUMP_S + GRACE_S)
        if stopped:
            self._dump_stacks(report)
        self.child.kill()
        self.child.wait()
        return self._record(HUNG, "hang", report)

    def _judge(self, found: dict[str, Any]) -> None:
        reports: list[dict[str, Any]] = []
        deadline = time.monotonic() + 2 * self.poll_s + 2 * DUMP_S + GRACE_S
        ended: frozenset[int] = frozenset()
        while len(reports) + len(ended) < self.world and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
            ended = frozenset(int(path.stem) for path in (self.control / "exit").glob("[0-9]*.json"))
            read = [read_json(path) for path in sorted((self.control / "reports").glob("[0-9]*.json"))]
            reports = [report for report in read if report]
        verdict = hang.judge(reports, self.world, found, ended)
        if records := recorder.found(self.control):
            verdict["nccl"] = str(records)
        line = hang.line(verdict)
        append_line(self.control.parent.parent / "events.jsonl", {"time": time.time(), "event": "HANG", **verdict})
        print(line, flush=True)
        write_json(self.control / "culprits.json", verdict)

    def _dump_stacks(self, report: dict[str, Any]) -> None:
        """Python stacks of all threads, by faulthandler's C handler, which runs whatever the main thread does.

        A stopped process takes the signal when it continues, for which it need not run any Python.
        """
        target = self.control / "stacks" / f"rank-{self.rank:05d}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (
            f"# rank {self.rank} on {self.host}: {report['phase']} of step {report['step']}, state {report['state']}\n"
        )
        if heartbeat.read(self.page).count:  # else it never installed the handler, and SIGUSR2 would kill it
            self.child.send_signal(signal.SIGUSR2)
            self.child.send_signal(signal.SIGCONT)
            text += self._dumped()
        else:
            text += "no stacks: the program never gave a heartbeat\n"
        target.write_text(text)
        recorder.dump(self.recorder, self.rank, DUMP_S)

    def _dumped(self) -> str:
        deadline, size = time.monotonic() + DUMP_S, -1
        while time.monotonic() < deadline:
            time.sleep(PAUSE_S)
            grown = os.fstat(self.stacks).st_size
            if grown and grown == size:
                break
            size = grown
        return os.pread(self.stacks, 2**22, 0).decode(errors="replace") or "no stacks within the time limit\n"

    def _end_after_peer(self) -> int:
        """Another rank failed: this one would wait for it in a collective, perhaps for half an hour."""
        deadline = time.monotonic() + GRACE_S  # most fail by themselves and say why
        while self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        return self._record(PEER_FAILED, "peer failed", {})

    def _ended(self, code: int) -> int:
        beat = self._beat()
        where = {"step": beat.step, "phase": beat.phase}
        if code < 0:
            where["signal"] = signal.Signals(-code).name
            code = 128 - code
        if code in OK:
            return self._record(code, "exit", where)
        crash = os.pread(self.stacks, 2**22, 0).decode(errors="replace")
        if crash:  # a fault in C code
            (self.control / "stacks").mkdir(exist_ok=True)
            (self.control / "stacks" / f"rank-{self.rank:05d}.txt").write_text(crash)
        was_first = first(self.control / "failed", {"rank": self.rank, "host": self.host, "code": code, **where})
        return self._record(code, "failed" if was_first else "failed later", where)

    def _record(self, code: int, how: str, where: dict[str, Any]) -> int:
        recorder.forget(self.recorder, self.rank)
        facts = {"rank": self.rank, "host": self.host, "code": code, "how": how, "signalled": self.signalled}
        write_json(self.control / "exit" / f"{self.rank:05d}.json", {**facts, **where, "time": time.time()})
        return code

    def _wait_for(self, path: Path, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(PAUSE_S)


def limits_of(control: Path) -> dict[str, float]:
    """Seconds per phase, as the attempt's `begin` wrote them; the defaults, with a word, if it did not."""
    limits: dict[str, float] | None = read_json(control / "limits.json")
    if limits is not None:
        return limits
    from configs.launch_section import LimitsConfig

    print(f"launch: no limits.json in {control}: watching with the default limits", file=sys.stderr, flush=True)
    return dict(vars(LimitsConfig()))


def refusal(place: Launch, control: Path) -> str | None:
    """Why this rank must not start: its launcher counts other ranks than the job has. None if it may."""
    expected = read_json(control.parent.parent / "launch" / "job.json", {}).get("world", place.world_size)
    if place.world_size == expected and 0 <= place.rank < expected:
        return None
    return (f"this is rank {place.rank} of {place.world_size}, but the job has {expected} ranks: RANK, WORLD_SIZE or "
            "SLURM_* come from another launcher; unset them")  # fmt: skip


def refuse(why: str, place: Launch, control: Path) -> int:
    """Write down that this rank did not start, which ends the job for good; its exit code."""
    print(f"launch error: {why}", file=sys.stderr, flush=True)
    facts = {"rank": place.rank, "host": socket.gethostname(), "code": 2, "how": "refused", "signalled": None}
    write_json(control / "exit" / f"{place.rank:05d}.json", {**facts, "why": why, "time": time.time()})
    return 2


def returned(code: int, env: Mapping[str, str]) -> int:
    """The agent's exit code for its trainer's: the same, but for a torchrun above it 0 instead of 85.

    torchrun takes 85 for a failure and kills the other ranks 30 s later, though they may still be saving.
    """
    return 0 if code == 85 and "TORCHELASTIC_RUN_ID" in env else code


def process_state(pid: int) -> str:
    """R, S, D, T, Z ... of /proc/PID/stat; ? if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _prepare_child() -> None:
    """In the child, before exec: SIGKILL when the agent dies, so that a killed agent leaves no trainer behind.

    Signals are ignored until the trainer has its own handlers: SLURM sends them to every process of a step at any time.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)


def main(argv: list[str]) -> int:
    """Run the trainer `argv` under an agent; the exit code of this rank."""
    place = from_environment(os.environ)
    control = Path(os.environ["HOPE_CONTROL"])
    if (why := refusal(place, control)) is not None:
        return refuse(why, place, control)
    command = [sys.executable, "-u", *argv]
    with contextlib.suppress(KeyboardInterrupt):
        return returned(Agent(command, control, place.rank, place.world_size).watch(), os.environ)
    return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
