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
from typing import IO, Any

import torch

from hope.train.console import console_line, event_line, format_event
from hope.train.throughput import Devices

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

    def close(self) -> None:
        """Close the files."""


class MetricsLog(NoLog):
    """Log of a run in `folder`, which is created.

    `resume_step` None starts a new log: a metrics.jsonl that is there is moved to metrics.jsonl.1 (.2, ...).
    A number continues after that step: later lines, and a line cut off by a crash, are dropped from
    metrics.jsonl, so that it holds every step once. events.jsonl is history and only ever grows.
    `say` prints a line. Non-finite numbers are null in the files (JSON has none), nan or inf on the console.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        steps: int,
        devices: Devices,
        resume_step: int | None = None,
        tensorboard: bool = True,
        say: Callable[[str], object] = lambda text: print(text, flush=True),
    ):
        self._folder = Path(folder)
        self._steps, self._devices, self._print = steps, devices, say
        self._folder.mkdir(parents=True, exist_ok=True)
        metrics, events = self._folder / "metrics.jsonl", self._folder / "events.jsonl"
        if resume_step is None:
            _move_aside(metrics)
            self._last = -1
        else:
            self._last = _keep_lines(metrics, lambda entry: entry["step"] <= resume_step)
        _keep_lines(events, lambda entry: True)
        self._metrics: IO[str] = metrics.open("a", encoding="utf-8")
        self._events: IO[str] = events.open("a", encoding="utf-8")
        self._board = _open_board(self._folder / "tensorboard", resume_step) if tensorboard else None

    def scalars(self, record: Mapping[str, Any]) -> None:
        """Write one step to metrics.jsonl, TensorBoard and the console.

        Raises ValueError when the step is not later than the last one written.
        """
        if record["step"] <= self._last:
            raise ValueError(f"metrics: step {record['step']} after step {self._last}; one record per step")
        self._last = record["step"]
        plain = {key: _plain(value) for key, value in record.items()}
        _write_line(self._metrics, plain)
        if self._board is not None:
            for key, value in plain.items():
                if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(key, value, record["step"])
        self._print(console_line(record, steps=self._steps, devices=self._devices))

    def histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        """Write the finite entries of `tensor` to TensorBoard, if it is on and there are any."""
        if self._board is None:
            return
        values = tensor.detach().float().flatten().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._board.add_histogram(name, values, step)

    def event(self, word: str, **fields: Any) -> None:
        """Write `{"time": ..., "event": word, ...}` to events.jsonl and the event's line to the console."""
        entry = {"time": round(time.time(), 3), "event": word}
        _write_line(self._events, entry | {key: _plain(value) for key, value in fields.items()})
        self._print(format_event(word, fields))

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._board is not None:
            self._board.close()


def open_log(
    keeps: bool,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    devices: Devices,
    resume_step: int | None = None,
    tensorboard: bool = True,
) -> NoLog:
    """A MetricsLog in the one process that `keeps` the log (rank 0), a NoLog in the others."""
    if not keeps:
        return NoLog()
    return MetricsLog(folder, steps=steps, devices=devices, resume_step=resume_step, tensorboard=tensorboard)


def _open_board(folder: Path, resume_step: int | None) -> Any:
    # Imported here: it takes about a second, which processes without a board should not pay.
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides events of earlier files from this step on.
    return SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)


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


def _write_line(file: IO[str], entry: Mapping[str, Any]) -> None:
    file.write(json.dumps(entry, allow_nan=False) + "\n")
    file.flush()


def _move_aside(path: Path) -> None:
    """Rename an existing file to the first free name.1, name.2, ..."""
    if path.exists() and path.stat().st_size > 0:
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(aside)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a .jsonl file with the whole lines that `keep` accepts; returns the last step in it, or -1."""
    if not path.exists():
        return -1
    old = path.read_text(encoding="utf-8", errors="replace")
    entries = [(line, _parse(line)) for line in old.splitlines(keepends=True)]
    kept = [(line, entry) for line, entry in entries if entry is not None and line.endswith("\n") and keep(entry)]
    new = "".join(line for line, _ in kept)
    if new != old:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return max((entry.get("step", -1) for _, entry in kept), default=-1)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
