"""A further place for a run's numbers, behind a thread: whatever happens to it, training goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

Numbers = Mapping[str, float]
WAITING, PATIENCE_S = 10_000, 20.0


class Sink(Protocol):
    """Where numbers go. Every method may raise, or wait for ever."""

    def log(self, numbers: Numbers, step: int) -> object:
        """Take the numbers of one step."""
        ...

    def finish(self) -> object:
        """Send what is not sent."""
        ...


class Background:
    """Numbers for the sink that `start` makes, in its own thread, up to its first error.

    Args:
        start: makes the sink, in the thread as well: it may wait for a network.
        name: what it is called in the one sentence that `say` gets if it fails.
        waiting: records that wait for it at most; further ones are lost.
        patience_s: how long `close` waits for it.
    """

    def __init__(
        self,
        start: Callable[[], Sink],
        name: str,
        say: Callable[[str], object],
        waiting: int = WAITING,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._start, self._name, self._say, self._patience_s = start, name, say, patience_s
        self._queue: queue.Queue[tuple[Numbers, int] | None] = queue.Queue(waiting)
        self._said = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, numbers: Numbers, step: int) -> None:
        """Hand over the numbers of one step; never waits."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait((dict(numbers), step))
        except queue.Full:
            self._tell(f"{self._name} does not keep up")

    def close(self) -> None:
        """Wait for what has been handed over, up to `patience_s`."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._tell(f"{self._name} did not end within {self._patience_s:g} s")

    def _work(self) -> None:
        try:
            sink = self._start()
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.finish()
        except BaseException as error:  # libraries call sys.exit, too
            self._tell(f"{self._name}: {type(error).__name__}: {error}")

    def _tell(self, what: str) -> None:
        if not self._said:
            self._said = True
            self._say(f"log: {what}; training goes on without it")
