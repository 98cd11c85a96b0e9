"""What a run writes down: metrics.jsonl, events.jsonl, TensorBoard and the console.

One process of a run makes a MetricsLog, the others a NoLog with the same methods, so that callers never ask
who they are.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hope.pipe import close_output
from hope.train.board import Board
from hope.train.console import console_line, event_line, format_event, print_line
from hope.train.sink import Background
from hope.train.throughput import Devices
from hope.train.written import LineFile, keep_lines, move_aside, replace_text

__all__ = ["MetricsLog", "NoLog", "console_line", "event_line", "open_log", "record_of_no_step"]


def record_of_no_step() -> dict[str, Any]:
    """What is known before the first step: the keys that every record has, with None for what was not measured."""
    keys = ("loss", "grad_norm", "lr", "step_time_s", "data_time_s", "tokens_per_s", "tokens_per_s_per_device")
    return {"step": 0, "tokens": 0, **dict.fromkeys((*keys, "mfu", "memory_gb"))}


class NoLog:
    """The log of a process that keeps none."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exit_info: object) -> None:
        self.close()

    def scalars(self, record: Mapping[str, Any]) -> None:
        """Log one step."""

    def histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        """Log the distribution of a tensor's entries."""

    def event(self, word: str, **fields: Any) -> None:
        """Log something that happened, such as SAVE, SKIP, SIGNAL, SLOW or RESUME."""

    def say(self, text: str) -> None:
        """Print on the console only."""

    def text(self, name: str, content: str) -> None:
        """Keep a small text file beside the log."""

    def close(self) -> None:
        """Close the files."""


class MetricsLog(NoLog):
    """Log of a run in `folder`, which is created.

    `resume_step` None starts a new log: a metrics.jsonl that is there is moved to metrics.jsonl.1 (.2, ...).
    A number continues after that step: later lines, and a line cut off by a crash, are dropped from
    metrics.jsonl, so that it holds every step once. events.jsonl is history and only ever grows.
    `say` prints a line. What cannot be written, as on a full disk, is said once and tried again with the next record:
    no log ends a run. Non-finite numbers are null in the files (JSON has none), nan or inf on the console.
    `sink` makes a further place for the numbers of every step.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        steps: int,
        devices: Devices,
        resume_step: int | None = None,
        tensorboard: bool = True,
        sink: Callable[[], Background] | None = None,
        say: Callable[[str], object] = print_line,
    ):
        self._folder = Path(folder)
        self._steps, self._devices, self._print = steps, devices, say
        metrics, events = self._folder / "metrics.jsonl", self._folder / "events.jsonl"
        self._last = -1
        try:
            (self._folder / "logs").mkdir(parents=True, exist_ok=True)  # for whoever starts the ranks
            if resume_step is None:
                move_aside(metrics)
            else:
                self._last = resume_step
                self._last = keep_lines(metrics, lambda entry: entry["step"] <= resume_step)
            keep_lines(events, lambda entry: True)
        except OSError as error:
            say(f"log: {error.filename} cannot be put in order: {error.strerror}; lines are added to it as it is")
        self._metrics, self._events = LineFile(metrics, say), LineFile(events, say)
        self._board = Board(self._folder / "tensorboard", resume_step, say) if tensorboard else None
        self._sink = sink() if sink is not None else None
        self._texts: dict[str, str] = {}

    def scalars(self, record: Mapping[str, Any]) -> None:
        """Write one step to metrics.jsonl, TensorBoard and the console.

        Raises ValueError when the step is not later than the last one written.
        """
        if record["step"] <= self._last:
            raise ValueError(f"metrics: step {record['step']} after step {self._last}; one record per step")
        self._last = record["step"]
        plain = {key: _plain(value) for key, value in record.items()}
        self._write_texts()
        self._metrics.write(json.dumps(plain, allow_nan=False))
        is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
        numbers = {key: value for key, value in plain.items() if key != "step" and is_number(value)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.scalar(key, value, record["step"])
        if self._sink is not None:
            self._sink.log(numbers, record["step"])
        self._print(console_line(record, steps=self._steps, devices=self._devices))

    def histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        """Write the finite entries of `tensor` to TensorBoard, if it is on and there are any."""
        if self._board is not None:
            self._board.histogram(name, tensor, step)

    def event(self, word: str, **fields: Any) -> None:
        """Write `{"time": ..., "event": word, ...}` to events.jsonl and the event's line to the console."""
        entry = {"time": round(time.time(), 3), "event": word}
        entry |= {key: _plain(value) for key, value in fields.items()}
        self._events.write(json.dumps(entry, allow_nan=False))
        self._print(format_event(word, fields))

    def say(self, text: str) -> None:
        self._print(text)

    def text(self, name: str, content: str) -> None:
        """Let the file `name` in the run's folder hold `content`; tried again with every record until it does."""
        self._texts[name] = content
        self._write_texts(say=True)

    def _write_texts(self, say: bool = False) -> None:
        for name, content in list(self._texts.items()):
            try:
                replace_text(self._folder / name, content)
                del self._texts[name]
            except OSError as error:
                if say:
                    self._print(f"log: {self._folder / name} cannot be written: {error.strerror}; training goes on")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._board is not None:
            self._board.close()
        if self._sink is not None:
            self._sink.close()
        close_output()


def open_log(
    keeps: bool,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    devices: Devices,
    resume_step: int | None = None,
    tensorboard: bool = True,
    sink: Callable[[], Background] | None = None,
) -> NoLog:
    """A MetricsLog in the one process that `keeps` the log (rank 0), a NoLog in the others."""
    if not keeps:
        return NoLog()
    return MetricsLog(folder, steps=steps, devices=devices, resume_step=resume_step, tensorboard=tensorboard, sink=sink)


def _plain(value: Any) -> Any:
    """JSON value: 0-d tensors and NumPy scalars become numbers, non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
