"""How far an evaluation is, on standard error."""

from __future__ import annotations

import sys
import time

EVERY_S = 60.0  # between lines in a file; on a terminal one line is rewritten


class Progress:
    """Told of every round: `name: 1,024 of 5,153, 12 s left`. shown: whether this process speaks."""

    def __init__(self, name: str, shown: bool) -> None:
        self._name, self._shown, self._next = name, shown, 0.0

    def __call__(self, done: int, total: int, seconds: float) -> None:
        """done, total: rows; seconds: since this process scored its first."""
        terminal = sys.stderr.isatty()
        if not self._shown or not (terminal or done == total or seconds >= self._next):
            return
        self._next = seconds + EVERY_S
        left = f", {seconds * (total - done) / done:.0f} s left" if seconds and done < total else ""
        line = f"{self._name}: {done:,} of {total:,}{left}"
        if terminal:
            print(f"\r{line}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


class Steps:
    """Told of every training step: `mqar rate0.001.seed1: 500 of 22,500, 80 s left, loss 3.21`."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps, self._began, self._next = name, steps, time.monotonic(), 0.0

    def __call__(self, step: int, loss: float) -> None:
        """step: counted from 1."""
        seconds = time.monotonic() - self._began
        if step == self._steps or seconds >= self._next:
            self._next = seconds + EVERY_S / 4
            left = seconds * (self._steps - step) / step
            line = f"{self._name}: {step:,} of {self._steps:,}, {left:.0f} s left, loss {loss:.4f}"
            print(line, file=sys.stderr, flush=True)
