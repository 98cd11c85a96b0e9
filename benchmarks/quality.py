"""Held-out loss of model kinds over a small grid of learning rates: runs `pretrain_hope.py` once per cell.

    python benchmarks/quality.py --data PREFIX_TRAIN PREFIX_HELDOUT --out runs/quality \
        --run matrix:240:7.5e-4,1.5e-3,3e-3 --run transformer:240:7.5e-4,1.5e-3,3e-3 --run mlp:500:1.5e-3

A cell is KIND:STEPS:LEARNING_RATES, with further overrides after a fourth colon. Cells are shared out over
`--gpus` devices, `--jobs` at a time on each. Prints a markdown table, and writes it with all curves to results.json.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hope.arguments import count
from hope.pipe import piped

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "matrix": ["model.mixers.hope.memory=matrix"],
    "mlp": ["model.mixers.hope.memory=mlp"],
    "hope_attention": ["configs/models/hope_attention.yaml"],
    "transformer": ["configs/models/transformer.yaml"],
}


def parse(text: str) -> list[dict]:
    kind, steps, rates, *more = text.split(":", 3)
    extra = more[0].split() if more else []
    if kind not in KINDS:
        raise SystemExit(f"--run {text}: {kind!r} is not one of {', '.join(KINDS)}")
    return [{"kind": kind, "steps": int(steps), "lr": float(rate), "extra": extra} for rate in rates.split(",")]


def run(cell: dict, args: argparse.Namespace, devices: Queue, name: str = "") -> dict:
    """`name`: of the run's folder; else made of the cell's settings."""
    device = devices.get()
    words = [w.split(".")[-1] for w in cell["extra"]]
    name = name or re.sub(r"[^\w.]", "", "_".join([cell["kind"], str(cell["steps"]), f"{cell['lr']:g}", *words]))
    overrides = [
        *KINDS[cell["kind"]],
        f"run.name={name}",
        f"run.dir={args.out}",
        f"data.train={args.data[0]}",
        f"data.heldout={args.data[1]}",
        f"train.steps={cell['steps']}",
        f"optim.lr={cell['lr']}",
        *cell["extra"],
    ]
    began = time.perf_counter()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(device)}
    try:
        log = Path(args.out) / f"{name}.log"
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / "pretrain_hope.py"), args.config, *overrides]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    finally:
        devices.put(device)
    return summarise(cell, Path(args.out) / name, log, code, time.perf_counter() - began)


def summarise(cell: dict, folder: Path, log: Path, code: int, seconds: float) -> dict:
    """Losses, speed and skipped steps of a finished run, from the files it wrote."""
    result = {**cell, "name": folder.name, "exit": code, "seconds": round(seconds, 1), "curve": [], "heldout": []}
    if (folder / "metrics.jsonl").exists():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        events = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
        speeds = sorted(r["tokens_per_s"] for r in records[2:] if r["tokens_per_s"])
        result |= {
            "curve": [[r["step"], r["loss"], r["grad_norm"]] for r in records if r["loss"] is not None],
            "heldout": [[r["step"], r["heldout_loss"]] for r in records if r.get("heldout_loss") is not None],
            "tokens_per_s": speeds[len(speeds) // 2] if speeds else math.nan,
            "memory_gb": max(r["memory_gb"] or 0 for r in records),
            "skipped": events.count("SKIP"),
        }
    state = f"heldout {result['heldout'][-1]}" if result["heldout"] else log.read_text()[-2000:]
    print(f"{folder.name:<40} exit {code}  {seconds:6.1f}s  {state}", flush=True)
    return result


def table(results: list[dict]) -> str:
    rows = [
        "| model | steps | lr | overrides | held-out | tokens/s | GiB | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if not r["heldout"]:
            continue
        extra = " ".join(r["extra"]) or "-"
        rows.append(
            f"| {r['kind']} | {r['steps']} | {r['lr']:g} | {extra} | {r['heldout'][-1][1]:.3f} | "
            f"{r['tokens_per_s'] / 1e3:.1f}k | {r['memory_gb']:.1f} | {r['skipped']} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/hope_17m_1xh200.yaml"))
    parser.add_argument("--data", nargs=2, required=True, metavar=("TRAIN", "HELDOUT"))
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--run", action="append", required=True)
    parser.add_argument("--gpus", type=count, default=1)
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time on one device")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    cells = [cell for text in args.run for cell in parse(text)]
    devices: Queue = Queue()
    for slot in range(args.gpus * args.jobs):
        devices.put(slot % args.gpus)
    with ThreadPoolExecutor(args.gpus * args.jobs) as pool:
        results = list(pool.map(lambda cell: run(cell, args, devices), cells))
    (Path(args.out) / "results.json").write_text(json.dumps(results))
    print(table(results))
    return max(r["exit"] for r in results)


if __name__ == "__main__":
    sys.exit(piped(main))
