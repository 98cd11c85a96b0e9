"""One rank killed, the run resumed on fewer devices in another layout: are its losses those of a run left alone?

    python benchmarks/kill_resume.py configs/hope_340m.yaml data.train=PREFIX data.heldout=PREFIX \
        --devices 4 --then-devices 2 --then parallel.tensor=2 --json kill_resume.json

Two runs of the configuration are made in the first layout. One is left alone. In the other, `--rank` gets a SIGKILL as
soon as step `--kill-at` is logged and the checkpoint of step `--save-at` is durable. When the group has ended, it is
resumed on `--then-devices`, with the overrides of `--then`. Its losses after the checkpoint are compared with those of
the run that was left alone. Both runs have equal seeds and data, so what differs is rounding. Their losses before
the kill, in one and the same layout, say how much of that there is without another layout.

A group of NCCL may wait for its lost rank. After `--grace` seconds whoever is left is killed too, as `launch` would do.
Exit code 0: resumed at the checkpoint, all losses within --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept import keep
from layouts import ROOT

from hope.arguments import count, finite, result_file, whole
from hope.pipe import piped
from hope.stored import folders
from launch.runs import records
from parallel.referee.verdict import LOSS_TOLERANCE, relative

POLL_S = 0.02


class Failed(Exception):
    """What was asked could not be tried; the message says why."""


class Runs:
    """The runs of one configuration in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.folder)
        self.deadline = time.monotonic() + args.limit

    def start(self, name: str, devices: int, overrides: list[str]) -> subprocess.Popen[bytes]:
        """A run under torchrun; it prints to NAME.log of the folder."""
        args = self.args
        keys = [f"train.steps={args.steps}", f"checkpoint.every={args.save_at}", "checkpoint.keep=100", "log.every=1",
                "log.tensorboard=false", f"run.dir={self.folder}", f"run.name={name}"]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}",
                   str(ROOT / "pretrain_hope.py"), args.config, *args.overrides, *overrides, *keys]  # fmt: skip
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Until it has ended well. Raises Failed."""
        try:
            code = process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end(process)
            raise Failed(f"{name} did not end in time:\n{self.last_lines(name)}") from None
        if code:
            raise Failed(f"{name} ended with {code}:\n{self.last_lines(name)}")

    def last_lines(self, name: str) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-15:])

    def losses(self, name: str) -> dict[int, float]:
        """By step, of training."""
        return {r["step"]: r["loss"] for r in records(self.folder / name) if r.get("loss") is not None}

    def durable(self, name: str) -> int:
        """The newest step that a restart would resume from; 0 if there is none."""
        place = self.folder / name / "checkpoints"
        found = folders.finished(place) if place.exists() else []
        return folders.step_of(found[0]) if found else 0

    def events(self, name: str, word: str) -> list[dict[str, Any]]:
        return [e for e in records(self.folder / name, "events.jsonl") if e.get("event") == word]

    def kill(self, process: subprocess.Popen[bytes], name: str) -> dict[str, Any]:
        """SIGKILL to one rank at its moment, and what became of the others. Raises Failed: it ended before."""
        args = self.args
        while max(self.losses(name), default=0) < args.kill_at or self.durable(name) < args.save_at:
            if process.poll() is not None:
                raise Failed(f"{name} ended before it could be killed; more --steps?\n{self.last_lines(name)}")
            if time.monotonic() > self.deadline:
                end(process)
                raise Failed(f"{name} did not get to its kill in time:\n{self.last_lines(name)}")
            time.sleep(POLL_S)
        ranks = ranks_of(process.pid)
        if args.rank not in ranks:
            end(process)
            raise Failed(f"no process of rank {args.rank} among {sorted(ranks)}")
        os.kill(ranks[args.rank], signal.SIGKILL)
        began = time.monotonic()
        try:
            process.wait(args.grace)
            alone = True
        except subprocess.TimeoutExpired:
            alone = False
            end(process, list(ranks.values()))
        done = max(self.losses(name))
        if done >= args.steps:
            raise Failed(f"{name} had made all {done} steps when its rank was killed; more --steps?")
        ended = time.monotonic() - began
        return {"killed_after_step": done, "ended_by_itself": alone, "ended_s": ended, "durable": self.durable(name)}


def ranks_of(parent: int) -> dict[int, int]:
    """{rank: process id} of torchrun's workers."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            above = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            words = (place / "environ").read_bytes().split(b"\0") if above == parent else []
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        rank = [word.removeprefix(b"RANK=") for word in words if word.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = int(place.name)
    return found


def end(process: subprocess.Popen[bytes], workers: list[int] | None = None) -> None:
    """Kill torchrun's workers, which are in sessions of their own, and then torchrun."""
    for worker in workers or ranks_of(process.pid).values():
        try:
            os.kill(worker, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def largest_error(wanted: dict[int, float], found: dict[int, float], steps: range) -> float:
    """Of losses of these steps, relative, NaN as infinite. Raises Failed: one is missing."""
    import torch

    missing = [step for step in steps if step not in wanted or step not in found]
    if missing or not steps:
        raise Failed(f"no loss of steps {missing or steps}")
    number = lambda value: torch.tensor(value, dtype=torch.float64)
    return max(relative(number(found[step]), number(wanted[step])) for step in steps)


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """All of it. Raises Failed."""
    runs = Runs(args)
    shutil.rmtree(runs.folder, ignore_errors=True)
    runs.folder.mkdir(parents=True)
    killed = runs.start("killed", args.devices, args.first)
    whole = runs.start("whole", args.devices, args.first) if args.together else None
    try:
        facts = runs.kill(killed, "killed")
        before = runs.losses("killed")
        resumed = runs.start("killed", args.then_devices, args.then)
        try:
            runs.wait(resumed, "killed")
        finally:
            if resumed.poll() is None:
                end(resumed)
        whole = whole or runs.start("whole", args.devices, args.first)
        runs.wait(whole, "whole")
    finally:
        for process in filter(None, (killed, whole)):
            if process.poll() is None:
                end(process)
    wanted, found = runs.losses("whole"), runs.losses("killed")
    at = [event["step"] for event in runs.events("killed", "RESUME")]
    if at != [facts["durable"]]:
        raise Failed(f"resumed at {at}, but step {facts['durable']} was durable when the rank was killed")
    after = range(at[0] + 1, args.steps + 1)
    saves = [
        {
            "run": name,
            "step": event["step"],
            "blocked_s": event["staged_s"] + event.get("waited_s", 0.0),
            "durable_s": event["durable_s"],
            "bytes": event["bytes"],
        }
        for name in ("killed", "whole")
        for event in runs.events(name, "SAVE")
    ]
    error = largest_error(wanted, found, after)
    return {
        "config": args.config,
        "overrides": args.overrides,
        "first": {"devices": args.devices, "overrides": args.first},
        "then": {"devices": args.then_devices, "overrides": args.then},
        **facts,
        "resumed_at": at[0],
        "losses": [{"step": step, "left_alone": wanted[step], "resumed": found[step]} for step in after],
        "error": error,
        "error_before_the_kill": largest_error(wanted, before, range(1, facts["killed_after_step"] + 1)),
        "tolerance": args.tolerance,
        "equal": error <= args.tolerance,
        "saves": saves,
        "at_a_time": args.together,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="section.key=value of all runs, YAML files to merge")
    parser.add_argument("--devices", type=count, default=4)
    parser.add_argument("--first", nargs="+", default=[], metavar="KEY=VALUE", help="of the first layout")
    parser.add_argument("--then-devices", type=count, default=2)
    parser.add_argument("--then", nargs="+", default=["parallel.tensor=2"], metavar="KEY=VALUE", help="of the second")
    parser.add_argument("--steps", type=whole(), default=16)
    parser.add_argument("--save-at", type=whole(), default=4, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=whole(), default=6, help="no earlier than when this step is logged")
    parser.add_argument("--rank", type=whole(0), default=1, help="that is killed")
    parser.add_argument("--grace", type=finite, default=60.0, help="seconds that the others have to end by themselves")
    parser.add_argument("--together", action="store_true", help="the run that is left alone at the same time")
    parser.add_argument("--tolerance", type=finite, default=0.0, help="of a loss, relative; default: the referee's")
    parser.add_argument("--precision", choices=list(LOSS_TOLERANCE), default="bf16", help="train.precision of all runs")
    parser.add_argument("--limit", type=finite, default=600.0, help="seconds for everything")
    parser.add_argument("--folder", default="runs/kill-resume", help="of the runs; it is removed at the start")
    parser.add_argument("--json", type=result_file)
    args = parser.parse_intermixed_args(argv)
    args.overrides.append(f"train.precision={args.precision}")
    args.tolerance = args.tolerance or LOSS_TOLERANCE[args.precision]
    try:
        found = experiment(args)
    except Failed as error:
        print(f"kill_resume: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if args.json:
        keep(args.json, found)
    return int(not found["equal"])


if __name__ == "__main__":
    sys.exit(piped(main))
