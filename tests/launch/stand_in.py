"""A stand-in for pretrain_hope.py: trains until a signal, saves for SAVE_S seconds, and leaves with the same codes."""

import os
import sys
import time
from pathlib import Path

from hope.train.heartbeat import Heartbeat
from hope.train.signals import StopRequest
from parallel.start.launcher import from_environment

beat, run, rank = Heartbeat(), Path(os.environ["HOPE_RUN"]), from_environment(os.environ).rank
run.mkdir(parents=True, exist_ok=True)
with StopRequest(usr1=True) as stop:
    beat("init")
    (run / f"pid.{rank}").write_text(f"{os.getpid()}\n")
    print(f"rank {rank} trains", flush=True)
    while not stop.requested:
        time.sleep(0.02)
    time.sleep(float(os.environ.get("SAVE_S", "0")) * (rank == 0))
    (run / f"saved.{rank}").write_text(f"{stop.name}\n")
sys.exit(0 if stop.name == "INT" else 85)
