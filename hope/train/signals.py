"""Stopping on a signal between two steps, with everything saved."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager that turns SIGINT, SIGTERM (and SIGUSR1 with `usr1`) into a flag to poll between steps.

    with StopRequest(usr1=True) as stop:
        for step in ...:
            train_one_step()
            if stop.requested:      # stop.name is "INT", "TERM" or "USR1"
                save(); break

    The first signal sets `name`, later ones leave it. A second SIGINT after `grace_s` seconds raises
    KeyboardInterrupt, for a step that hangs; sooner it is the same Ctrl-C, which the terminal sends to every process
    and torchrun passes on to its workers once more. Each process sees only its own signals: agreeing on a step among
    ranks is the caller's task.
    The previous handlers are put back on exit. Main thread only (signal.signal raises ValueError elsewhere).
    """

    def __init__(self, *, usr1: bool = False, grace_s: float = 3.0):
        self.name: str | None = None
        self._grace_s = grace_s
        self._signals = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR1] if usr1 else [])
        self._first_interrupt: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        for caught in self._signals:
            self._previous[caught] = signal.signal(caught, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for caught, handler in self._previous.items():
            # None: the handler was installed from C and cannot be put back from Python.
            signal.signal(caught, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        if self.name is None:
            self.name = caught.name.removeprefix("SIG")
        if caught != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt >= self._grace_s:
            raise KeyboardInterrupt
