"""Kill a training run with SIGKILL at random moments, restart it, and compare it with one that was left alone.

    PYTHONPATH=.:tests python tests/crash.py --rounds 50        (make crash-test)
    PYTHONPATH=.:tests python tests/crash.py --rounds 6 configs/hope_17m_1xh200.yaml section.key=value ...

A round starts the run, which resumes from its checkpoints, and kills one rank or all of them: at some moment of
training, or within a save. Then the next start must resume exactly at the checkpoint that was durable at the kill; when
the run gets to its end, every loss must equal the uninterrupted run's to the last bit, and another run begins. Ranks
are forked after one import, so a round takes seconds. With GPUs, each process one, they start afresh, and all of them
are killed: the peer of a rank that died waits in NCCL, and it is the launcher that ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multirank import preload
from tiny import config_file

import pretrain_hope
from hope.stored import folders
from parallel.start.launcher import free_port

STEPS = 30
FLAGS = [f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=3", "train.eval_every=10", "log.every=1"]
PATIENCE_S = 120.0  # a rank whose peer died must end by itself


@dataclass
class Tally:
    """What happened over all rounds."""

    kills: int = 0
    in_save: int = 0
    of_all: int = 0
    resumed: int = 0
    finished: int = 0
    unfinished_saves: int = 0


class Crashes:
    """A run in `folder`, over and over."""

    def __init__(self, folder: Path, ranks: int, seed: int, run: list[str]) -> None:
        """`run`: a config file and overrides; empty: a tiny model."""
        self._folder, self._ranks, self._random = folder, ranks, random.Random(seed)
        self._arguments = [*(run or [config_file(folder)]), f"run.dir={folder / 'runs'}", *FLAGS]
        self._run = folder / "runs" / "crashing"
        self.tally = Tally()
        self._wait(self._start("whole"), must_succeed=True)
        self._expected = _losses(folder / "runs" / "whole")

    def round(self, in_save: bool, kill_all: bool) -> str:
        """Start, kill, check; returns what happened in a line. Raises AssertionError."""
        durable = self._durable()
        workers = self._start("crashing")
        self._until_the_moment(workers, in_save)
        victims = workers if kill_all else [self._random.choice(workers)]
        alive = [worker for worker in victims if worker.is_alive()]
        for worker in alive:
            worker.kill()
        self._wait(workers, must_succeed=False)
        resumed = self._check_resume(durable)
        self.tally.kills += bool(alive)
        self.tally.in_save += in_save and bool(alive)
        self.tally.of_all += kill_all and bool(alive)
        unfinished = len(list((self._run / "checkpoints").glob(".unfinished-step_*")))
        self.tally.unfinished_saves += unfinished
        how = "ended by itself" if not alive else f"killed {'all' if kill_all else 'one'}{' in a save' * in_save}"
        line = f"resumed at {resumed}, {how}, durable {self._durable()}, {unfinished} unfinished"
        if self._durable() == STEPS:
            self.finish()
            line += ", finished: bit-equal"
        return line

    def finish(self) -> None:
        """Let the run come to its end, compare it, and begin another."""
        self._wait(self._start("crashing"), must_succeed=True)
        assert _losses(self._run) == self._expected, "the run is not the one that was left alone"
        self.tally.finished += 1
        shutil.rmtree(self._run)

    def _start(self, name: str) -> list[Any]:
        """The ranks of a run as processes, each its own group of threads, output into a file."""
        port, context = free_port(), mp.get_context("spawn" if torch.cuda.is_available() else "fork")
        self._started = time.time()
        self._events_before = len(_events(self._folder / "runs" / name))
        workers = []
        for rank in range(self._ranks):
            flags = [*self._arguments, f"run.name={name}"]
            arguments = (flags, rank, self._ranks, port, self._folder / "output.txt")
            workers.append(context.Process(target=_rank, args=arguments, daemon=True))
            workers[-1].start()
        return workers

    def _until_the_moment(self, workers: list[Any], in_save: bool) -> None:
        """Wait for some moment of training, or for a save and some moment of it; or for the end of the run."""
        begun = len(_lines(self._run / "metrics.jsonl"))
        wanted = begun + self._random.randrange(1, 8)
        while all(worker.is_alive() for worker in workers):
            if in_save and self._saving():
                time.sleep(self._random.uniform(0, 0.06))
                return
            if not in_save and len(_lines(self._run / "metrics.jsonl")) >= wanted:
                time.sleep(self._random.uniform(0, 0.3))
                return
            time.sleep(0.001)

    def _saving(self) -> bool:
        """Whether there is an unfinished save that this start began, not one that the round before left."""
        for path in (self._run / "checkpoints").glob(".unfinished-step_*"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if path.stat().st_mtime > self._started:
                    return True
        return False

    def _wait(self, workers: list[Any], must_succeed: bool) -> None:
        deadline = time.monotonic() + PATIENCE_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        stuck = [worker for worker in workers if worker.is_alive()]
        for worker in stuck:
            worker.kill()
        output = (self._folder / "output.txt").read_text()[-3000:]
        assert not stuck, f"{len(stuck)} ranks hung {PATIENCE_S} s after the kill\n{output}"
        codes = [worker.exitcode for worker in workers]
        assert not must_succeed or codes == [0] * len(workers), f"exit codes {codes}\n{output}"

    def _durable(self) -> int:
        found = folders.finished(self._run / "checkpoints") if self._run.exists() else []
        return folders.step_of(found[0]) if found else 0

    def _check_resume(self, durable: int) -> int | None:
        """The step that this start resumed at, None if it was killed before it could say so."""
        new = _events(self._run)[self._events_before :]
        steps = [event["step"] for event in new if event["event"] == "RESUME"]
        if not steps:
            return None
        assert steps == [durable], f"resumed at {steps}, but step {durable} was durable"
        self.tally.resumed += 1
        return steps[0]


def _rank(flags: list[str], rank: int, ranks: int, port: int, output: Path) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    code = 1
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            code = pretrain_hope.main(flags)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # also one that a new start moves aside at this moment
        return path.read_text().splitlines()
    return []


def _events(run: Path) -> list[dict]:
    return [json.loads(line) for line in _lines(run / "events.jsonl") if line.endswith("}")]


def _losses(run: Path) -> list[tuple]:
    records = [json.loads(line) for line in _lines(run / "metrics.jsonl")]
    return [(r["step"], r["loss"], r["grad_norm"], r.get("heldout_loss")) for r in records]


def rounds(folder: Path, count: int, ranks: int = 2, seed: int = 0, run: list[str] | None = None) -> Tally:
    """`count` kills, half of them in saves, half of them of all ranks; and the run to its end."""
    preload()
    crashes = Crashes(folder, ranks, seed, run or [])
    number = 0
    while crashes.tally.kills < count:
        line = crashes.round(in_save=number % 2 == 0, kill_all=number % 4 < 2 or torch.cuda.is_available())
        print(f"round {number + 1:>3}: {line}", flush=True)
        number += 1
    crashes.finish()
    return crashes.tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="config file and overrides; without: a tiny model")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as place:
        print(rounds(Path(place), args.rounds, args.ranks, args.seed, args.run))
