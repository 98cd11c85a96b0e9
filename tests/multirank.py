"""Run a function on n ranks of one machine: forked after the imports are done, 0.1 s instead of 6 s.

A worker's exception is raised here with the worker's traceback; a hang fails and shows where each rank stood.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.start.groups import import_quietly
from parallel.start.launcher import free_port

_PRELOAD = ("parallel.compute.pipeline", "parallel.optimizer.zero", "parallel.checkpoint.saving")


class RankDied(RuntimeError):
    """A worker ended without a result: killed, or it called os._exit."""


class RankTimeout(RuntimeError):
    """Workers did not finish in time; the message holds their stacks."""


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(*args)` in `n` processes with torchrun's variables set; return their results in rank order.

    With CUDA the workers are spawned (a CUDA context does not survive a fork), so `fn` must be importable.

    Raises:
        the first worker's exception, with its traceback attached as a note and as cause;
        RankDied, RankTimeout. All workers are gone when this returns or raises.
    """
    preload()
    context = mp.get_context("spawn" if torch.cuda.is_available() else "fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as stacks:
        pipes, workers = [], []
        for rank in range(n):
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, fn, args, rank, n, port, stacks, 0.9 * timeout)
            worker = context.Process(target=_worker, args=job, daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        try:
            return _collect(pipes, workers, timeout, Path(stacks))
        finally:
            _end(workers)


def preload() -> None:
    """Import what workers need, once, so that they can be forked."""
    if torch.cuda.is_available():
        return  # workers are spawned and import for themselves
    import_quietly()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _PRELOAD:
            importlib.import_module(name)


def _worker(
    pipe: Any, fn: Callable[..., Any], args: tuple, rank: int, n: int, port: int, stacks: str, dump_after: float
) -> None:
    torch.set_num_threads(1)  # the parent's OpenMP pool does not survive a fork; one thread never asks for it
    gc.freeze()  # DeepSpeed collects garbage 10 times when it starts in bf16: 0.28 s each over all the imports
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    with open(Path(stacks) / str(rank), "w") as file:
        faulthandler.dump_traceback_later(dump_after, file=file)
        try:
            answer = (True, fn(*args), "")
        except BaseException as error:
            answer = (False, error, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
    pipe.send_bytes(_pickled(answer))
    pipe.close()
    os._exit(0)  # skip the parent's exit handlers, inherited by the fork


def _pickled(answer: tuple[bool, Any, str]) -> bytes:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)  # an exception with its own __init__ may pickle and not unpickle
        return data
    except Exception:
        _, value, text = answer
        return pickle.dumps((False, RuntimeError(f"a worker's result cannot be pickled: {value!r}"), text))


def _collect(pipes: list[Any], workers: list[Any], timeout: float, stacks: Path) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = time.monotonic() + timeout
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = sorted(waiting.values())
            shown = "".join(f"\n--- rank {r}\n{(stacks / str(r)).read_text()}" for r in ranks)
            raise RankTimeout(f"ranks {ranks} did not finish in {timeout} s{shown}")
        for pipe in ready:
            rank = waiting.pop(pipe)
            results[rank] = _receive(pipe, rank, workers[rank])
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Any, rank: int, worker: Any) -> Any:
    try:
        succeeded, value, text = pickle.loads(pipe.recv_bytes())
    except EOFError:
        worker.join(5)
        code = worker.exitcode
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        raise RankDied(f"rank {rank} ended without a result: {how}") from None
    if succeeded:
        return value
    value.add_note(f"on rank {rank}:\n{text}")
    raise value from RuntimeError(f"on rank {rank}:\n{text}")


def _end(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(5)
