"""Optimizers against each other on real text: learning rate tuned on one seed, the same grid for each, then more seeds.

    python benchmarks/optim_ab.py --data PREFIX_TRAIN PREFIX_HELDOUT --out runs/optim --models matrix transformer \
        --steps 640 --grid 7.5e-4 1.5e-3 3e-3 --seeds 1 2 3 --gpus 1 --jobs 4

Equal tokens for every cell. A cell runs `pretrain_hope.py` once; the first seed runs the whole grid, the others only
the rate that was best for it. Writes a markdown table (also results.json) and, per model, curves of the best runs.
A run that is there already is not repeated, so a call that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curves import draw
from quality import KINDS, ROOT, run, summarise

OPTIMIZERS = {
    "adamw": ["optim.name=adamw"],
    "dmgd_linear": ["optim.objective=dot", "optim.normalise=value"],  # Eq. 47
    "dmgd_mlp": ["optim.memory=mlp"],
    "dmgd_mlp_gradient": ["optim.memory=mlp", "optim.mlp_key=gradient"],
    "dmgd_mlp_dot": ["optim.memory=mlp", "optim.mlp_key=gradient", "optim.objective=dot", "optim.normalise=value"],
    "dmgd_erase": ["optim.erase=0.1", "optim.bias_correction=false"],
    "muon": ["optim.name=muon", "optim.beta1=0.95"],
    "m3": ["optim.name=m3"],
}
# dot sums where l2 averages: at equal learning rate its steps are 1 / (1 - beta1) = 10 times as long
RATE = {"dmgd_linear": 0.1, "dmgd_mlp_dot": 0.1}


def cell(model: str, optimizer: str, rate: float, seed: int, args: argparse.Namespace) -> dict:
    lr = rate * RATE.get(optimizer, 1.0)
    extra = [*OPTIMIZERS[optimizer], f"run.seed={seed}", f"data.seed={seed}", "checkpoint.every=0", *args.set]
    name = f"{model}_{optimizer}_{rate:g}_{seed}"
    return {"kind": model, "optimizer": optimizer, "steps": args.steps, "lr": lr, "rate": rate, "seed": seed,
            "extra": [*extra, f"run.name={name}"], "run": name}  # fmt: skip


def execute(cells: list[dict], args: argparse.Namespace, devices: Queue) -> list[dict]:
    def one(item: dict) -> dict:
        folder = Path(args.out) / item["run"]
        done = folder / "done.json"
        if done.exists():
            return summarise(item, folder, folder / "log", 0, json.loads(done.read_text()))
        result = run(item, args, devices, name=item["run"])
        if result["exit"] == 0:
            done.write_text(json.dumps(result["seconds"]))
        return result

    with ThreadPoolExecutor(args.gpus * args.jobs) as pool:
        return list(pool.map(one, cells))


def best_rate(results: list[dict], model: str, optimizer: str) -> float:
    found = [r for r in results if (r["kind"], r["optimizer"]) == (model, optimizer) and r["heldout"]]
    return min(found, key=lambda r: r["heldout"][-1][1])["rate"]


def table(results: list[dict], args: argparse.Namespace) -> str:
    """Final held-out loss of every rate on the first seed; at the best rate mean and spread over seeds."""
    first = args.seeds[0]
    head = ["model", "optimizer", *(f"{rate:g}" for rate in args.grid), "best", "mean of seeds", "spread", "ms/step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in args.models:
        for optimizer in args.optimizers:
            mine = [r for r in results if (r["kind"], r["optimizer"]) == (model, optimizer) and r["heldout"]]
            if not mine:
                continue
            tuned = {r["rate"]: r["heldout"][-1][1] for r in mine if r["seed"] == first}
            rate = best_rate(mine, model, optimizer)
            finals = [r["heldout"][-1][1] for r in mine if r["rate"] == rate]
            times = statistics.median(1e3 * args.tokens / r["tokens_per_s"] for r in mine)
            losses = [f"{tuned[x]:.3f}" if x in tuned else "failed" for x in args.grid]
            spread = f"{max(finals) - min(finals):.3f} ({len(finals)})"
            row = [model, optimizer, *losses, f"{rate:g}", f"{statistics.mean(finals):.3f}", spread, f"{times:.0f}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def tokens_per_step(args: argparse.Namespace) -> int:
    from configs.schema import load

    return load(args.config, args.set, check=False).train.tokens_per_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/hope_17m_1xh200.yaml"))
    parser.add_argument("--data", nargs=2, required=True, metavar=("TRAIN", "HELDOUT"))
    parser.add_argument("--out", default="runs/optim")
    parser.add_argument("--models", nargs="+", default=["matrix", "transformer"], choices=list(KINDS))
    main_ones = ["adamw", "dmgd_linear", "dmgd_mlp", "muon", "m3"]
    parser.add_argument("--optimizers", nargs="+", default=main_ones, choices=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--grid", nargs="+", type=float, default=[7.5e-4, 1.5e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C", help="overrides for every run")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on one device")
    args = parser.parse_args()
    args.tokens = tokens_per_step(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    devices: Queue = Queue()
    for slot in range(args.gpus * args.jobs):
        devices.put(slot % args.gpus)
    pairs = [(model, optimizer) for model in args.models for optimizer in args.optimizers]
    first, *others = args.seeds
    results = execute([cell(m, o, rate, first, args) for m, o in pairs for rate in args.grid], args, devices)
    learned = {(r["kind"], r["optimizer"]) for r in results if r["heldout"]}
    more = [cell(m, o, best_rate(results, m, o), seed, args) for m, o in pairs for seed in others if (m, o) in learned]
    results += execute(more, args, devices)
    (Path(args.out) / "results.json").write_text(json.dumps(results))
    for model in args.models:
        best = {
            o: Path(args.out) / cell(model, o, best_rate(results, model, o), first, args)["run"]
            for o in args.optimizers if (model, o) in learned
        }  # fmt: skip
        (Path(args.out) / f"{model}.svg").write_text(draw(best))
    print(table(results, args))
    return max(r["exit"] for r in results)


if __name__ == "__main__":
    sys.exit(main())
