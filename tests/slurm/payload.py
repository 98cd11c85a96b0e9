"""A stand-in for pretrain_hope.py: same signals, heartbeat, checkpoints' names and exit codes, in 0.1 s instead of 8.

Ranks meet in files: at every step each writes a flag and waits for the others', as an all-reduce would. What it does
wrong, and when, is in RUN/behaviour.json: steps (of the whole run), first (the same in the first attempt), step_s, exit
(the last code), lingers_s (of rank 0 after a save), and fail {rank, step, code} in the numbers of `attempts`.
"""

import json
import os
import sys
import time
from pathlib import Path

from hope.train.heartbeat import Heartbeat
from hope.train.signals import StopRequest
from parallel.start.launcher import from_environment

beat = Heartbeat()
run, control = Path(os.environ["HOPE_RUN"]), Path(os.environ["HOPE_CONTROL"])
place = from_environment(os.environ)
wanted = json.loads((run / "behaviour.json").read_text())
steps, step_s, fail = wanted.get("steps", 20), wanted.get("step_s", 0.1), wanted.get("fail", {})
number = len(list(run.glob("control/*/attempt.json"))) - 1
if number == 0:
    steps = wanted.get("first", steps)  # an attempt that only a signal ends
bad = fail.get("rank") == place.rank and number in wanted.get("attempts", [0])


def any_rank(flag: bool, name: str) -> bool:
    """Whether any rank says so; waits for all."""
    folder = control / "sync"
    folder.mkdir(exist_ok=True)
    mine = folder / f"{name}.{place.rank}"
    unfinished = folder / f".{mine.name}"
    unfinished.write_text(str(int(flag)))
    unfinished.rename(mine)
    others = [folder / f"{name}.{rank}" for rank in range(place.world_size)]
    while not all(other.exists() for other in others):
        time.sleep(0.01)
    return any(other.read_text() == "1" for other in others)


def save(step: int) -> None:
    folder = run / "checkpoints" / f"step_{step:08d}"
    beat("save")
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text("{}")
    any_rank(False, f"saved{step}")


def note(text: str) -> None:
    with (run / f"steps.{place.rank}").open("a") as file:
        file.write(f"{text}\n")


if place.rank == 0:
    (run / "devices").write_text(f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}")
with StopRequest(usr1=True) as stop:
    beat("init")
    done = [int(path.name[5:]) for path in run.glob("checkpoints/step_*")]
    step = max(done, default=0)
    print(f"rank {place.rank} of {place.world_size} on {os.uname().nodename} from step {step}", flush=True)
    while step < steps:
        step += 1
        beat("forward", step)
        if bad and step == fail["step"]:
            if fail["code"] == "freeze":
                beat("data", step)
                os.kill(os.getpid(), 19)
            elif fail["code"] == "kill":
                os.kill(os.getpid(), 9)
            else:
                sys.exit(fail["code"])
        time.sleep(step_s)
        beat("backward", step)
        stopping = any_rank(stop.requested, str(step))
        note(str(step))
        if stopping:
            save(step)
            note(f"saved {step}")
            interrupted = any_rank(stop.name == "INT", "interrupted")
            if "lingers_s" in wanted:  # the last meeting is over: the others leave now
                time.sleep(wanted["lingers_s"] * (place.rank == 0))  # as the rank that finishes a save
                note("left")
            sys.exit(0 if interrupted else 85)
    save(step)
sys.exit(wanted.get("exit", 0))
