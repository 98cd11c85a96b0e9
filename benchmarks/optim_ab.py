"""Optimizers against each other on real text: learning rate tuned on one seed, the same grid for each, then more seeds.

    python benchmarks/optim_ab.py --data PREFIX_TRAIN PREFIX_HELDOUT --out runs/optim --models matrix transformer \
        --steps 640 --tune-steps 240 --grid 1.5e-3 3e-3 6e-3 --seeds 1 2 3 --gpus 2 --jobs 4

Equal tokens for every cell of a stage. A cell runs `pretrain_hope.py` once. The first seed runs the whole grid for
`--tune-steps` (0: for `--steps`), with a schedule that ends there; then every seed runs `--steps` at the best rate.
A grid of one rate is not tuned.
Writes a markdown table (also results.json) and, per model, curves of the best runs. A run that is there already is
not repeated, so a call that was cut off goes on.
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

from configs.errors import ConfigError
from configs.schema import load
from hope.arguments import count, finite, whole
from hope.pipe import piped

OPTIMIZERS = {
    "adamw": ["optim.name=adamw"],
    "dmgd_linear": ["optim.dmgd.objective=dot", "optim.dmgd.normalise=value"],  # Eq. 47
    "dmgd_mlp": ["optim.dmgd.memory=mlp"],
    "dmgd_mlp_match": ["optim.dmgd.memory=mlp", "optim.dmgd.output=rms_match"],
    "dmgd_mlp_gradient": ["optim.dmgd.memory=mlp", "optim.dmgd.mlp.key=gradient"],
    "dmgd_mlp_gradient_match": ["optim.dmgd.memory=mlp", "optim.dmgd.mlp.key=gradient", "optim.dmgd.output=rms_match"],
    "dmgd_mlp_dot": [
        "optim.dmgd.memory=mlp",
        "optim.dmgd.mlp.key=gradient",
        "optim.dmgd.objective=dot",
        "optim.dmgd.normalise=value",
    ],
    "dmgd_mlp_slow": ["optim.dmgd.memory=mlp", "optim.dmgd.mlp.lr=0.01"],
    "dmgd_mlp_clip": ["optim.dmgd.memory=mlp", "optim.dmgd.mlp.key=gradient", "optim.dmgd.output=rms_clip"],
    "dmgd_erase": ["optim.dmgd.erase=0.1", "optim.dmgd.bias_correction=false"],
    "muon": ["optim.name=muon", "optim.beta1=0.95"],
    "m3": ["optim.name=m3"],
}
# dot sums where l2 averages: at equal learning rate its steps are 1 / (1 - beta1) = 10 times as long
RATE = {"dmgd_linear": 0.1, "dmgd_mlp_dot": 0.1}


def used(words: list[str], config: str, chosen: list[str]) -> list[str]:
    """Of `words`, those whose key the chosen model and optimizer use: the program refuses the others by name."""
    try:
        load(config, [*chosen, *words], check=False)
    except ConfigError as error:
        unused = {problem.path for problem in error.problems if problem.what.startswith("is not used")}
        return [word for word in words if word.partition("=")[0] not in unused]
    return words


def cell(model: str, optimizer: str, rate: float, seed: int, steps: int, args: argparse.Namespace) -> dict:
    lr = rate * RATE.get(optimizer, 1.0)
    settings = used(args.set, args.config, [*KINDS[model], *OPTIMIZERS[optimizer]])
    extra = [*OPTIMIZERS[optimizer], f"run.seed={seed}", f"data.seed={seed}", "checkpoint.every=0", *settings]
    name = f"{model}_{optimizer}_{rate:g}_{seed}_{steps}"
    return {"kind": model, "optimizer": optimizer, "steps": steps, "lr": lr, "rate": rate, "seed": seed,
            "extra": [*extra, f"run.name={name}"], "run": name}  # fmt: skip


def execute(item: dict, args: argparse.Namespace, devices: Queue) -> dict:
    folder = Path(args.out) / item["run"]
    done = folder / "done.json"
    if done.exists():
        return summarise(item, folder, folder / "log", 0, json.loads(done.read_text()))
    result = run(item, args, devices, name=item["run"])
    if result["exit"] == 0:
        done.write_text(json.dumps(result["seconds"]))
    return result


def tuned(results: list[dict], model: str, optimizer: str, args: argparse.Namespace) -> dict[float, float]:
    """Rate -> final held-out loss of the first seed's grid."""
    mine = [r for r in results if (r["kind"], r["optimizer"], r["seed"]) == (model, optimizer, args.seeds[0])]
    return {r["rate"]: final(r) for r in mine if r["heldout"] and r["steps"] == args.tune_steps and r["exit"] == 0}


def best_rate(results: list[dict], model: str, optimizer: str, args: argparse.Namespace) -> float | None:
    """None: every rate failed."""
    if len(args.grid) == 1:
        return args.grid[0]
    losses = tuned(results, model, optimizer, args)
    return min(losses, key=lambda rate: losses[rate], default=None)


def final(result: dict) -> float:
    return result["heldout"][-1][1]


def study(pair: tuple[str, str], args: argparse.Namespace, devices: Queue) -> list[dict]:
    """All cells of one model with one optimizer: the grid, then the seeds at the best rate."""
    model, optimizer = pair
    grid = args.grid if len(args.grid) > 1 else []
    cells = [cell(model, optimizer, rate, args.seeds[0], args.tune_steps, args) for rate in grid]
    with ThreadPoolExecutor(len(cells) + len(args.seeds)) as pool:
        results = list(pool.map(lambda item: execute(item, args, devices), cells))
        best = best_rate(results, model, optimizer, args)
        if best is None:
            return results
        names = {r["run"] for r in results}
        more = [cell(model, optimizer, best, seed, args.steps, args) for seed in args.seeds]
        return results + list(
            pool.map(lambda item: execute(item, args, devices), [c for c in more if c["run"] not in names])
        )


def table(results: list[dict], args: argparse.Namespace) -> str:
    """Held-out loss of every rate in the grid; at the best rate mean and spread of the seeds' final losses."""
    rates = [f"{rate:g}" for rate in args.grid]
    head = ["model", "optimizer", *rates, "best", "mean of seeds", "spread", "ms/step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in args.models:
        for optimizer in args.optimizers:
            losses = tuned(results, model, optimizer, args)
            missing = "failed" if len(args.grid) > 1 else "not tuned"
            grid = [f"{losses[rate]:.3f}" if rate in losses else missing for rate in args.grid]
            ends = seeds_of(results, model, optimizer, args)
            row = [model, optimizer, *grid, "-", "-", "-", "-"]
            if ends:
                finals = [final(r) for r in ends]
                times = statistics.median(1e3 * args.tokens / r["tokens_per_s"] for r in ends)
                spread = f"{max(finals) - min(finals):.3f} ({len(finals)})"
                row[-4:] = [f"{ends[0]['rate']:g}", f"{statistics.mean(finals):.3f}", spread, f"{times:.0f}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def seeds_of(results: list[dict], model: str, optimizer: str, args: argparse.Namespace) -> list[dict]:
    """The full-length runs at the best rate."""
    best = best_rate(results, model, optimizer, args)
    return [
        r for r in results
        if (r["kind"], r["optimizer"], r["rate"], r["steps"]) == (model, optimizer, best, args.steps)
        and r["heldout"] and r["exit"] == 0
    ]  # fmt: skip


def tokens_per_step(args: argparse.Namespace) -> int:
    return load(args.config, used(args.set, args.config, []), check=False).train.tokens_per_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/hope_17m_1xh200.yaml"))
    parser.add_argument("--data", nargs=2, required=True, metavar=("TRAIN", "HELDOUT"))
    parser.add_argument("--out", default="runs/optim")
    parser.add_argument("--models", nargs="+", default=["matrix", "transformer"], choices=list(KINDS))
    main_ones = ["adamw", "dmgd_linear", "dmgd_mlp", "muon", "m3"]
    parser.add_argument("--optimizers", nargs="+", default=main_ones, choices=list(OPTIMIZERS))
    parser.add_argument("--steps", type=whole(), default=640)
    parser.add_argument("--tune-steps", type=whole(0), default=0, help="of the grid's runs; 0: as --steps")
    parser.add_argument("--grid", nargs="+", type=finite, default=[1.5e-3, 3e-3, 6e-3])
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[1, 2, 3])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="A.B=C", help="overrides for every run whose choices use the key"
    )
    parser.add_argument("--gpus", type=count, default=1)
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time on one device")
    args = parser.parse_args()
    args.tokens = tokens_per_step(args)
    args.tune_steps = args.tune_steps or args.steps
    Path(args.out).mkdir(parents=True, exist_ok=True)
    devices: Queue = Queue()
    for slot in range(args.gpus * args.jobs):
        devices.put(slot % args.gpus)
    pairs = [(model, optimizer) for model in args.models for optimizer in args.optimizers]
    with ThreadPoolExecutor(len(pairs)) as pool:
        results = [r for found in pool.map(lambda pair: study(pair, args, devices), pairs) for r in found]
    (Path(args.out) / "results.json").write_text(json.dumps(results))
    for model in args.models:
        ends = {o: seeds_of(results, model, o, args) for o in args.optimizers}
        best = {o: Path(args.out) / found[0]["run"] for o, found in ends.items() if found}
        if best:
            (Path(args.out) / f"{model}.svg").write_text(draw(best))
    print(table(results, args))
    return max(r["exit"] for r in results)


if __name__ == "__main__":
    sys.exit(piped(main))
