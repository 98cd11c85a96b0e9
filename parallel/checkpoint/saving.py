"""When a run is saved, and what happens when that fails.

Training waits only while its states are copied to host memory (`staged`); a thread writes them, with process groups of
its own, and the checkpoint counts from `durable` on. At most one save is in flight: the next waits for it, and says
so. A failed save leaves the checkpoints before it and the run alive; too many in a row end it, and so does one that
the run was going to stop on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hope.stored import folders
from hope.train.config import CheckpointConfig
from hope.train.metrics import NoLog
from parallel.checkpoint.carried import Stream
from parallel.checkpoint.checkpointer import Checkpointer, SavedCheckpoint, Staged
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.together import reason
from parallel.optimizer.checkpoint_views import ShardedState
from parallel.start.groups import Ranks, any_rank

SAVE_FILE, STOP_FILE = "SAVE", "STOP"


@dataclass(frozen=True)
class Wishes:
    """What the ranks agreed to do after a step. `signal`: a rank was told to stop; `stop`: that, or the STOP file."""

    save: bool
    stop: bool
    signal: bool


@dataclass
class _InFlight:
    """A save from its staging on; once `thread` has ended, `written` or `error` is set. `answers`: the SAVE file."""

    step: int
    staged_s: float
    waited_s: float
    answers: bool
    thread: threading.Thread | None = None
    written: SavedCheckpoint | None = None
    error: str | None = None
    reported: bool = False


class Saver:
    """The save policy of one run. All ranks make the same calls at the same steps.

    Args:
        folder: the run's folder; checkpoints are written to `folder/checkpoints`, and the files `SAVE` and `STOP` in it
            are wishes of whoever touched them.
        config: the checkpoint section.
        contents: `contents(step)`: what else a checkpoint records, plain JSON.
        stream: states that are carried from step to step.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        checkpointer: Checkpointer,
        ranks: Ranks,
        models: nn.Module | Sequence[nn.Module],
        optimizer: ShardedState,
        contents: Callable[[int], dict[str, Any]],
        stream: Stream | None = None,
    ) -> None:
        self._stream = stream
        self._folder, self._config, self._ranks = folder, config, ranks
        self._checkpointer, self._models, self._optimizer, self._contents = checkpointer, models, optimizer, contents
        self._in_flight: _InFlight | None = None
        self._saved_step: int | None = None
        self._failures = 0
        self._answering = False  # the SAVE file was seen, and is removed once its checkpoint is durable
        checkpointer.reserve(optimizer)

    def wishes(self, signalled: bool) -> Wishes:
        """Agree between all ranks, once per step: on signals that any rank got, and on the files that rank 0 sees."""
        own = [signalled, False, False]
        if self._ranks.rank == 0:
            own[1] = (self._folder / STOP_FILE).exists()
            own[2] = not self._answering and (self._folder / SAVE_FILE).exists()
        flags = torch.tensor(own, dtype=torch.int32, device=self._ranks.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signal, stop, save = (bool(flag) for flag in flags.tolist())
        return Wishes(save=save, stop=signal or stop, signal=signal)

    def after_step(self, step: int, last: bool, wishes: Wishes, log: NoLog) -> None:
        """Save if it is due, wished, or the end; and tell what became of a save in flight.

        Raises:
            SaveError: the run is to stop here and this save failed, or checkpoint.max_failures in a row did.
        """
        self._report(log)
        self._answering |= wishes.save
        due = self._config.every > 0 and step % self._config.every == 0
        final = wishes.stop or last
        if due or wishes.save or final:
            self._save(step, log, wait=final or not self._config.asynchronous)
        if final and self._saved_step != step:
            raise SaveError(f"no checkpoint of step {step}, at which the run was to stop; see SAVE_FAILED")
        if wishes.stop and self._ranks.rank == 0:
            (self._folder / STOP_FILE).unlink(missing_ok=True)

    def _save(self, step: int, log: NoLog, wait: bool) -> None:
        """Stage now; write in the background, or with `wait` before this returns. Collective."""
        waited = self._finish(log)
        if self._saved_step == step:
            return
        began = time.perf_counter()
        contents = self._contents(step) if self._ranks.rank == 0 else {}
        staged = self._checkpointer.stage(step, self._models, self._optimizer, contents, self._stream)
        save = self._in_flight = _InFlight(step, time.perf_counter() - began, waited, self._answering)
        if wait:
            self._write(save, staged)
            self._finish(log)
        else:
            save.thread = threading.Thread(target=self._write, args=(save, staged), daemon=True)
            save.thread.start()

    def close(self, log: NoLog, patience_s: float = 300.0) -> None:
        """Wait for a save in flight: for every way out, also that of an error, so without agreeing on anything."""
        if self._in_flight is not None and self._in_flight.thread is not None:
            self._in_flight.thread.join(patience_s)
            self._report(log)

    def last_good(self, log: NoLog) -> str:
        """Name of the newest checkpoint that a restart would resume from, or none; waits for a save in flight."""
        self.close(log)
        found = folders.finished(self._folder / "checkpoints")
        return found[0].name if found else "none"

    def _write(self, save: _InFlight, staged: Staged) -> None:
        try:
            save.written = self._checkpointer.write(staged)
        except Exception as error:  # told and counted where training can hear it
            save.error = reason(error)

    def _finish(self, log: NoLog) -> float:
        """Wait for the save in flight, agree on how it went, count; returns the seconds waited."""
        save, began = self._in_flight, time.perf_counter()
        if save is None:
            return 0.0
        if save.thread is not None:
            save.thread.join()
        waited = time.perf_counter() - began
        self._report(log)
        self._in_flight = None
        if not any_rank(save.error is not None):
            self._failures, self._saved_step = 0, save.step
            return waited
        self._failures += 1
        if self._failures >= self._config.max_failures:
            raise SaveError(
                f"{self._failures} saves in a row failed (checkpoint.max_failures), the last at step {save.step}: "
                f"{save.error or 'on another rank, see its log'}"
            )
        return waited

    def _report(self, log: NoLog) -> None:
        """Log how the save in flight ended, once, as soon as it has."""
        save = self._in_flight
        if save is None or save.reported or (save.written is None and save.error is None):
            return
        save.reported = True
        waited = {"waited_s": save.waited_s} if save.waited_s > 0 else {}
        if save.written is None:
            log.event("SAVE_FAILED", step=save.step, in_a_row=self._failures + 1, reason=save.error, **waited)
            return
        durable = save.staged_s + save.written.seconds
        facts = {"staged_s": save.staged_s, "durable_s": durable, "bytes": save.written.bytes, **waited}
        if save.written.doubt:
            log.event("DOUBTFUL", step=save.step, reason=save.written.doubt, **facts)
        else:
            log.event("SAVE", step=save.step, **facts)
        for note in save.written.notes:
            log.say(f"SAVE note: {note}")
        if save.answers:
            self._answering = False
            if self._ranks.rank == 0:
                (self._folder / SAVE_FILE).unlink(missing_ok=True)
