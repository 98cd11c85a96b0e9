"""What watches a training step from outside, in one place, so that the step itself reads as mathematics.

The heartbeat tells the launcher which phase this process is in. Two timers measure whole steps and this rank's own
work. A probe reads the memories. A profiler records some steps. None of them changes a number of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hope.model import Model
from hope.train.config import LogConfig, TrainConfig
from hope.train.diagnostics import MixerProbe
from hope.train.heartbeat import Heartbeat
from hope.train.profiler import StepProfiler
from hope.train.stragglers import BusyTimer
from hope.train.throughput import Devices, StepTimer, memory_gb, mfu


@dataclass(frozen=True)
class Taken:
    """Which records a step leaves."""

    logged: bool
    """A line on the console and in metrics.jsonl."""
    evaluated: bool
    """That line, with held-out losses."""
    drawn: bool
    """Histograms of the memories' gates."""

    @property
    def line(self) -> bool:
        """Whether the step has a line of either sort, which needs its loss."""
        return self.logged or self.evaluated


class Instruments:
    """Heartbeat, timers and probe around the steps of one process.

    Args:
        beat: this process's heartbeat.
        train, log: how many tokens a step has, and which steps leave records.
        models: this rank's part of the model.
        rank, world_size: of this process, among all processes of the run.
        device: where it computes.
        folder: of the run, for what `train.profile` asks for; None: nothing is profiled.
        borders: further steps after which it is evaluated.
    """

    def __init__(
        self,
        beat: Heartbeat,
        train: TrainConfig,
        log: LogConfig,
        models: Sequence[Model],
        rank: int,
        world_size: int,
        device: torch.device,
        folder: Path | None = None,
        borders: Collection[int] = (),
    ) -> None:
        self.beat = beat
        self.devices = Devices.of(device, world_size)
        self.probe = MixerProbe(models)
        self._train, self._log, self._device, self._borders = train, log, device, borders
        self._timer = StepTimer(train.tokens_per_step, self.devices)
        self._busy = BusyTimer(rank, device)
        profiled = train.profile if folder is not None else None
        self.profiler = StepProfiler(profiled, models, (folder or Path()) / "profile", device, keeps=rank == 0)

    def taken(self, step: int, last: int) -> Taken:
        """Which records `step` leaves, when `last` is the last one of this process."""
        every, histograms = self._train.eval_every, self._log.histograms
        return Taken(
            logged=step % self._log.every == 0 or step in (1, last),
            evaluated=step == last or step in self._borders or (every > 0 and step % every == 0),
            drawn=histograms > 0 and step % histograms == 0,
        )

    def logged_within(self, step: int, period: int, last: int) -> bool:
        """Whether one of the `period` steps from `step` on has a line, so that it can tell of an update made now."""
        end = min(step + period - 1, last)
        return end == last or step == 1 or end // self._log.every > (step - 1) // self._log.every

    @contextmanager
    def step(self, step: int, last: int) -> Iterator[Taken]:
        """Around everything that counts as the time of a step. It begins with waiting for data."""
        taken = self.taken(step, last)
        self.probe.arm(taken.logged or taken.drawn)
        with self.profiler.step(step):
            self._timer.begin()
            self._busy.begin()
            self.beat("data", step)
            yield taken
            self._timer.end()

    def tell(self, say: Callable[[str], object]) -> None:
        """Say what the profiler has found since the last call."""
        for text in self.profiler.told():
            say(text)

    def close(self, say: Callable[[str], object]) -> None:
        """A run may end before the last step that it was to profile."""
        self.profiler.close()
        self.tell(say)

    @contextmanager
    def passes(self) -> Iterator[Callable[[str], object]]:
        """Around the forward and backward passes, which are told what to call with "forward" and "backward".

        The data is here when it is entered. When it is left, the next thing is a collective over all ranks.
        """
        self._timer.got_data()
        yield self.beat
        self._busy.end()
        self.beat("optimizer")

    def speed(self, step: int, flops_per_token: float) -> dict[str, float | None]:
        """Times in s, tokens/s, MFU as a fraction and GiB of memory since the last call, and `eta_s` after `step`."""
        speed = self._timer.report()
        return {
            **speed,
            "mfu": mfu(speed["tokens_per_s"], flops_per_token, self.devices),
            "memory_gb": memory_gb(self._device),
            "eta_s": self._timer.eta_s(self._train.total_steps - step),
        }

    def readings(self) -> dict[str, float]:
        """This rank's part of a record, for a union over all ranks: norms of its memories, and how busy it was.

        On CUDA call it after a synchronisation.
        """
        return {**self.probe.scalars(), **self._busy.entry()}

    def take_slow(self, record: dict[str, Any], ratio: float) -> list[dict[str, Any]]:
        """Remove all ranks' work from the union `record`, and give the slow ones as `BusyTimer.take_slow` does."""
        return self._busy.take_slow(record, ratio)
