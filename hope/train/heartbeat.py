"""What this process is doing now, for whoever watches it from outside: step and phase in a shared page of memory.

A beat costs a store, no system call, so every phase of every step can have one. The page is a file descriptor that the
watching process made (`HOPE_HEARTBEAT`, a number); a second one (`HOPE_STACKS`) takes the stacks of all threads on
SIGUSR2 and on a crash. Without them a Heartbeat does nothing. No torch here: the watcher reads with the same module.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("start", "init", "data", "forward", "backward", "optimizer", "save", "evaluate", "exit")
STEP_PHASES = ("data", "forward", "backward", "optimizer")
HEARTBEAT, STACKS = "HOPE_HEARTBEAT", "HOPE_STACKS"
SIZE = mmap.PAGESIZE
# beats so far; time (CLOCK_MONOTONIC, s); step; steps that this process finished; phase; beats so far again: equal
# counts at both ends show that the record is not half written
_RECORD = struct.Struct("<qdqqqq")


@dataclass(frozen=True)
class Beat:
    """One reading. `time` is CLOCK_MONOTONIC of this host in seconds; `steps` were finished by this process."""

    count: int = 0
    time: float = 0.0
    step: int = 0
    steps: int = 0
    phase: str = "start"

    @property
    def limited_by(self) -> str:
        """The key of `launch.limits` that bounds this phase: its own, or first_step until one step is finished."""
        if self.phase in STEP_PHASES and self.steps == 0:
            return "first_step"
        return {"start": "init", "exit": "save"}.get(self.phase, self.phase)


class Heartbeat:
    """`beat("forward", step)`: this process enters a phase. A phase without a step keeps the last one's."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._count = self._step = self._steps = 0
        self._page: mmap.mmap | None = None
        if HEARTBEAT in env:
            self._page = mmap.mmap(int(env[HEARTBEAT]), SIZE)
        if STACKS in env:
            faulthandler.enable(int(env[STACKS]))
            faulthandler.register(signal.SIGUSR2, int(env[STACKS]))

    def __call__(self, phase: str, step: int | None = None) -> None:
        if step is not None and step > self._step and self._step > 0:
            self._steps += 1
        self._step = self._step if step is None else step
        if self._page is not None:
            self._count += 1
            fields = (self._count, time.monotonic(), self._step, self._steps, PHASES.index(phase), self._count)
            _RECORD.pack_into(self._page, 0, *fields)


def read(page: mmap.mmap) -> Beat:
    """The last beat in a page of shared memory; Beat() before the first."""
    for _ in range(100):
        first, at, step, steps, phase, last = _RECORD.unpack_from(page, 0)
        if first == last:
            return Beat(first, at, step, steps, PHASES[phase]) if first else Beat()
    return Beat()
