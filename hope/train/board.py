"""TensorBoard's files of a run. What cannot be written there is lost, and training goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RETRY_S = 60.0


class Board:
    """Scalars and histograms for TensorBoard, in `folder`.

    TensorBoard hides what earlier files hold from step `resume_step` + 1 on; None: everything. After an error `say`
    hears of it once, and every `retry_s` seconds a new file is tried. The numbers are in metrics.jsonl too.
    """

    def __init__(
        self, folder: Path, resume_step: int | None, say: Callable[[str], object], retry_s: float = RETRY_S
    ) -> None:
        self._folder, self._say, self._retry_s = folder, say, retry_s
        self._purge: int | None = 0 if resume_step is None else resume_step + 1
        self._writer: Any = None
        self._failing, self._next_try = False, 0.0
        self._attempt(lambda writer: None)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Draw one number."""
        self._attempt(lambda writer: writer.add_scalar(name, value, step))

    def histogram(self, name: str, tensor: torch.Tensor, step: int) -> None:
        """Draw the distribution of the finite entries of `tensor`, if there are any."""
        values = tensor.detach().float().flatten().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._attempt(lambda writer: writer.add_histogram(name, values, step))

    def close(self) -> None:
        """Write what is still in memory."""
        self._attempt(lambda writer: writer.close())

    def _attempt(self, act: Callable[[Any], object]) -> None:
        if self._writer is None and time.monotonic() < self._next_try:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            act(self._writer)
        except OSError as error:  # of the thread that writes, too: its writer raises it at every later call
            self._writer, self._next_try = None, time.monotonic() + self._retry_s
            if not self._failing:
                self._say(f"log: {self._folder} cannot be written: {error.strerror}; training goes on without it")
            self._failing = True

    def _open(self) -> Any:
        # Imported here: it takes about a second, which processes without a board should not pay.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=None if self._failing else self._purge)
