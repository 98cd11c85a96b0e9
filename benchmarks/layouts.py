"""Tokens per second and peak memory of layouts relative to one device, and the referee's verdict on the same devices.

    python benchmarks/layouts.py configs/hope_340m.yaml --devices 2 [section.key=value ...]
    python benchmarks/layouts.py configs/hope_340m.yaml --devices 2 --referee train.seq_len=512 model.layers=4
    python benchmarks/layouts.py CONFIG --layout "PP, 8 micro-batches=parallel.pipeline=2 train.micro_batch=4" ...

Every layout trains the same model on the same number of random tokens per step, through the code that a run uses (no
data files are read). One warm-up step, then the median of `--steps`. With --referee, `parallel.parity` judges every
layout in fp32 and in bf16 instead, `--jobs` of them at a time. `--layout` adds one, or puts another in its place.
Prints a markdown table, and with --out writes JSON.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kept import keep

from configs.schema import Config, load, validate_without_data
from hope.arguments import count, finite, result_file, whole
from hope.batch import Batch
from hope.pipe import piped
from hope.train.numerics import set_numerics
from hope.train.throughput import GIB
from launch.estimate import worst_rank
from parallel.compute.replica import Replica, build_replica
from parallel.referee.evidence import micro_batches
from parallel.start import groups

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "DP": [],
    "TP": ["parallel.tensor={n}"],
    "TP+SP": ["parallel.tensor={n}", "parallel.sequence=true"],
    "PP": ["parallel.pipeline={n}"],
}


def worker(config_path: str, overrides: list[str], steps: int) -> dict:
    """One rank's part of a timing; see `timed`."""
    config = load(config_path, overrides, check=False)
    with groups.start(config.parallel) as ranks:
        return timed(config, ranks, steps)


def timed(config: Config, ranks: groups.Ranks, steps: int) -> dict:
    """Seconds of `steps` steps of a new model and, in front, of the one before, by rank 0; and the largest peak.

    Collective. It leaves nothing on the device.
    """
    train, batch = config.train, config.train.global_batch
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(ranks.device)
    set_numerics(train)
    replica = build_replica(
        config.model,
        config.optim,
        config.parallel,
        ranks,
        seq_len=train.seq_len,
        precision=train.precision,
        seed=config.run.seed,
        recompute=train.recompute,
        tokens_per_step=train.tokens_per_step,
        loss_chunk=train.loss_chunk,
        compile=train.compile,
        cuda_graphs=train.cuda_graphs,
    )
    try:
        tokens = torch.randint(0, config.model.vocab_size, (train.seq_len + 1, batch))
        mine = micro_batches(Batch(tokens[:-1], tokens[1:], None), train.micro_batch, ranks)
        warm = 2 if train.cuda_graphs else 1  # a graph is recorded in the second step
        seconds = [one_step(replica, mine) for _ in range(warm + steps)][warm - 1 :]
    finally:
        replica.close()
    peak = torch.cuda.max_memory_reserved(ranks.device) / GIB if cuda else 0.0
    del replica, mine
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    peaks = groups.merged({f"{ranks.rank}": peak})
    name = torch.cuda.get_device_name(ranks.device) if cuda else "cpu"
    tokens_per_s = batch * train.seq_len / statistics.median(seconds[1:])
    return {"tokens_per_s": tokens_per_s, "seconds": seconds, "peak_gib": max(peaks.values()), "device": name}


def one_step(replica: Replica, mine: Sequence[Batch]) -> float:
    """Seconds of one training step, from when all ranks begin to when all have ended."""
    groups.barrier()
    began = time.perf_counter()
    replica.run(mine)
    replica.reduce()
    norm = sum(n * n for n in replica.optimizer.grad_norms().values()) ** 0.5  # waits for the device
    replica.optimizer.set_lr(1e-4)
    replica.optimizer.step(min(1.0, 1 / (norm + 1e-6)))
    groups.barrier()
    return time.perf_counter() - began


def predicted_gib(config_path: str, overrides: list[str], world: int) -> float:
    """The largest predicted peak of any stage."""
    config = load(config_path, overrides, check=False)
    return worst_rank(config, config.parallel, world).peak / GIB


def torchrun(world: int, arguments: list[str]) -> subprocess.Popen[str]:
    """A program in `world` processes; its output can be read."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def launch(world: int, arguments: list[str], limit: float) -> tuple[int, str]:
    """(exit code, output) of a program under torchrun; one that takes longer than `limit` s is ended."""
    process = torchrun(world, arguments)
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, which are in sessions of their own
        text, _ = process.communicate()
    return process.returncode, text


def last_json(text: str) -> dict:
    """The last line that is a JSON object; libraries print as well."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def time_layout(args: argparse.Namespace, world: int, more: list[str]) -> dict:
    overrides = [*args.overrides, *more]
    worker_arguments = [__file__, args.config, *overrides, "--worker", "--steps", str(args.steps)]
    code, text = launch(world, worker_arguments, args.limit)
    if code:
        return {"failed": code}
    return {**last_json(text), "predicted_gib": predicted_gib(args.config, overrides, world)}


def speed(args: argparse.Namespace, layouts: dict[str, list[str]]) -> dict:
    print("| layout | tokens/s | of one device | peak GiB | predicted |\n|---|---|---|---|---|", flush=True)
    found: dict[str, dict] = {}
    for name, more in {"1 device": [], **layouts}.items():
        row = found[name] = time_layout(args, args.devices if name in layouts else 1, more)
        base = found["1 device"].get("tokens_per_s", float("nan"))
        if "failed" in row:
            print(f"| {name} | failed with exit code {row['failed']} | | | |", flush=True)
            continue
        print(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['tokens_per_s'] / base:.2f} | "
            f"{row['peak_gib']:.1f} | {row['predicted_gib']:.1f} |",
            flush=True,
        )
    return found


def verdict(args: argparse.Namespace, more: list[str], precision: str) -> dict:
    arguments = ["-m", "parallel.parity", args.config, *args.overrides, *more, f"train.precision={precision}"]
    code, text = launch(args.devices, [*arguments, "--json"], args.limit)
    return last_json(text) or {"failed": code}


def referee(args: argparse.Namespace, layouts: dict[str, list[str]]) -> dict:
    """Verdicts as they come, so that whoever runs out of time has those that were there."""
    found: dict[str, dict] = {}
    print(
        "| layout | precision | verdict | worst gradient | loss | all weights |\n|---|---|---|---|---|---|", flush=True
    )
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {
            pool.submit(verdict, args, more, precision): (name, precision)
            for name, more in layouts.items()
            for precision in ("fp32", "bf16")
        }
        for done in as_completed(running):
            name, precision = running[done]
            found[f"{name} {precision}"] = row = done.result()
            print(f"| {name} | {precision} | {judged(row)} |", flush=True)
            save(args.out, found)
    return found


def judged(row: dict) -> str:
    """A verdict as cells of the table."""
    if "failed" in row:
        return f"failed with exit code {row['failed']} | | |"
    worst, loss = row["parameters"][0], max(step["error"] for step in row["losses"])
    word = "equal" if row["equal"] else "DIFFERENT"
    return f"{word} | {worst['gradient']:.1e} {worst['name']} | {loss:.1e} | {row['weights_error']:.1e}"


def save(out: Path | None, found: dict) -> None:
    if out:
        keep(out, found)


def chosen_layouts(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> overrides."""
    known = {name: LAYOUTS[name] for name in args.only.split(",") if name}
    for text in args.layout:
        name, _, overrides = text.partition("=")
        known[name] = overrides.split()
    return {name: [o.format(n=args.devices) for o in overrides] for name, overrides in known.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--devices", type=count, default=2)
    parser.add_argument("--steps", type=whole(), default=5)
    parser.add_argument("--only", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--layout", action="append", default=[], metavar="NAME=OVERRIDES", help="{n}: of devices")
    parser.add_argument("--referee", action="store_true")
    parser.add_argument("--jobs", type=count, default=1, help="verdicts at a time, which share the devices")
    parser.add_argument("--limit", type=finite, default=600.0, help="seconds for one layout")
    parser.add_argument("--out", type=result_file)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        found = worker(args.config, args.overrides, args.steps)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found), flush=True)
        return 0
    chosen = chosen_layouts(args)
    for more in chosen.values():  # a layout that cannot be is refused before anything starts
        validate_without_data(load(args.config, [*args.overrides, *more], check=False), args.devices, args.config)
    found = referee(args, chosen) if args.referee else speed(args, chosen)
    save(args.out, found)
    return int(any("failed" in row or row.get("equal") is False for row in found.values()))


if __name__ == "__main__":
    sys.exit(piped(main))
