"""Which ranks are slower than the others: each measures its own work, before it waits for all of them.

In synchronous training every rank's step takes as long as the slowest one's. What differs is the time from the start of
a step to the first sum over all data-parallel ranks: data, forward, backward. Ranks of one tensor- or pipeline-parallel
group wait for each other inside it, so that a slow member makes its whole group slow.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch

PREFIX = "busy "


class BusyTimer:
    """Seconds of own work per step; on CUDA by events, because the host runs ahead of the device."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._key = f"{PREFIX}{rank} {socket.gethostname()}"
        self._cuda = device.type == "cuda"
        self._open: Any = None
        self._spans: list[Any] = []
        self._before: set[str] = set()

    def begin(self) -> None:
        self._open = self._now()

    def end(self) -> None:
        """The next thing is a collective over all ranks."""
        self._spans.append((self._open, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def entry(self) -> dict[str, float]:
        """{"busy RANK HOST": median seconds since the last call}, for a union over ranks; {} before the first step.

        On CUDA call it after a synchronisation.
        """
        spans, self._spans = self._spans, []
        if not spans:
            return {}
        seconds = [a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans]
        return {self._key: statistics.median(seconds)}

    def take_slow(self, everyone: dict[str, float], ratio: float) -> list[dict[str, Any]]:
        """Remove the entries of all ranks from `everyone`; the slow ones as fields of a SLOW event, slowest first.

        Slow: twice in a row at least `ratio` times the median and 5 ms more than it; ratio 0: none.
        """
        busy = {key: everyone.pop(key) for key in [key for key in everyone if key.startswith(PREFIX)]}
        if ratio <= 0 or len(busy) < 2:
            return []
        median = statistics.median(busy.values())
        now = {key for key, s in busy.items() if s >= ratio * median and s - median > 0.005}
        twice, self._before = now & self._before, now
        return [_fields(key, busy[key], median) for key in sorted(twice, key=lambda key: -busy[key])]


def _fields(key: str, seconds: float, median: float) -> dict[str, Any]:
    rank, host = key.removeprefix(PREFIX).split(" ", 1)
    return {"rank": int(rank), "node": host, "times_median": seconds / median, "busy_s": seconds}
