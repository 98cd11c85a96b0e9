"""How far an evaluation is, on standard error."""

from __future__ import annotations

import sys

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
