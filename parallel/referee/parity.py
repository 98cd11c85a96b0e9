"""The referee: a layout against one device, parameter by parameter.

    python -m parallel.parity CONFIG [section.key=value ...] [--data 2] [--steps 4] [--json] [--tolerance X]
    torchrun --nproc-per-node 8 -m parallel.parity CONFIG ...          under a launcher, also on GPUs

Both sides make the same few training steps on the same random tokens from the same initial weights; then every
gradient of the first step, every loss, every weight after the last step and every memory state is compared. CMS
periods above 3 count as 3, so that an update of every level is among the steps, and optim.eps is at least 1e-4. What is
beyond its bound is compared with what rounding does to it on one device (`parallel.referee.verdict`), and printed.
Without a launcher it starts its own processes: tensor x pipeline x context x --data of them. Exit code 0: equal within
the tolerance; 1: not; 2: bad config.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time

import torch

from configs.errors import ConfigError
from configs.schema import Config, load, validate_without_data
from hope.arguments import count, finite, whole
from hope.batch import Batch
from parallel.compute.replica import build_replica
from parallel.referee.evidence import Evidence, Task, from_layout
from parallel.referee.verdict import judge, table
from parallel.start import groups, launcher
from parallel.start.errors import LaunchError

# Adam's normaliser turns the rounding of an almost zero gradient into a step of full size; with the usual 1e-8, layouts
# part by the learning rate in single elements, and by 4e-5 of the loss after four steps.
REFEREE_EPS = 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or YAML files")
    parser.add_argument("--data", type=count, default=1, help="data-parallel degree, without a launcher")
    parser.add_argument("--steps", type=count, default=4)
    parser.add_argument("--tolerance", type=finite, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--rows", type=whole(0), default=12, help="parameters to show, worst first")
    args = parser.parse_intermixed_args(argv)
    try:
        launch = launcher.from_environment(os.environ)
        config = load(args.config, args.overrides, check=False)
        world = launch.world_size
        if world == 1:
            world = config.parallel.tensor * config.parallel.pipeline * config.parallel.context * args.data
        validate_without_data(config, world, args.config)
        if launch.world_size == 1 and world > 1:
            return start_processes(world, sys.argv[1:] if argv is None else argv)
        return referee(config, args)
    except (ConfigError, LaunchError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2


def start_processes(world: int, argv: list[str]) -> int:
    """The same command in `world` processes on this machine; the exit code that they agree on, or the first failure's.

    Not torchrun: it takes a verdict for a crash, and shows its own stack below it.
    """
    command = [sys.executable, "-m", "parallel.parity", *argv]
    common = {"OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port())}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    processes = [subprocess.Popen(command, env={**common, **place}) for place in places]
    try:
        return _agreed_code(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _agreed_code(processes: list[subprocess.Popen[bytes]]) -> int:
    """Of processes that all end; once one has failed, its peers may wait for it, and get a few seconds."""
    failed_at = None
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code not in (None, 0, 1)]
        if None not in codes or (failed_at is not None and time.monotonic() - failed_at > 5.0):
            return failed[0] if failed else max(code for code in codes if code is not None)
        if failed and failed_at is None:
            failed_at = time.monotonic()
        time.sleep(0.05)


def referee(config: Config, args: argparse.Namespace) -> int:
    """Run both sides in this process group, print the verdict on rank 0, agree on the exit code."""
    task = make_task(config, args.steps)
    with groups.start(config.parallel) as ranks:
        found = run_layout(config, task, ranks)
        equal = True
        if found is not None:
            verdict = judge(task, found, ranks.device, args.tolerance)
            equal = verdict["equal"]
            print(json.dumps(verdict) if args.json else table(verdict, args.rows), flush=True)
        return int(groups.any_rank(not equal))


def make_task(config: Config, steps: int) -> Task:
    """Random tokens of the configured batch; every CMS level due at least once; no learning-rate schedule."""
    cms = dataclasses.replace(config.model.cms, periods=[min(p, 3) for p in config.model.cms.periods], unit="steps")
    model = dataclasses.replace(config.model, cms=cms)
    train, generator = config.train, torch.Generator().manual_seed(config.run.seed)
    shape = (train.seq_len + 1, train.global_batch)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
        starts = None
        if config.data.documents == "reset":
            starts = torch.rand(train.seq_len, train.global_batch, generator=generator) < 4 / train.seq_len
            starts[0] = True
        batches.append(Batch(tokens[:-1], tokens[1:], starts))
    optim = dataclasses.replace(config.optim, eps=max(config.optim.eps, REFEREE_EPS))
    return Task(model, optim, train.precision, train.grad_clip, config.run.seed, batches)


def run_layout(config: Config, task: Task, ranks: groups.Ranks) -> Evidence | None:
    replica = build_replica(
        task.model,
        task.optim,
        config.parallel,
        ranks,
        seq_len=config.train.seq_len,
        precision=task.precision,
        seed=task.seed,
        recompute=config.train.recompute,
        loss_chunk=config.train.loss_chunk,
        compile=config.train.compile,
        cuda_graphs=config.train.cuda_graphs,
    )
    try:
        return from_layout(task, replica, config.train.micro_batch)
    finally:
        replica.close()
