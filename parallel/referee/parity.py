"""The referee: a layout against one device, parameter by parameter.

    python -m parallel.parity CONFIG [section.key=value ...] [--data 2] [--steps 4] [--json] [--tolerance X]
    torchrun --nproc-per-node 8 -m parallel.parity CONFIG ...          under a launcher, also on GPUs

Both sides make the same few training steps on the same random tokens from the same initial weights; then every
gradient of the first step, every loss, every weight after the last step and every memory state is compared. CMS
periods above 3 count as 3, so that an update of every level is among the steps, and optim.eps is at least 1e-4.
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
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import Config, load, validate
from parallel.compute.replica import build_replica
from parallel.referee.evidence import Evidence, Task, TokenBatch, from_layout, single_device
from parallel.start import groups, launcher
from parallel.start.errors import LaunchError

# Relative error of a gradient tensor (Frobenius norms) or a memory state. fp32: sums in another order. bf16: parameters
# and activations carry 8 bits; an initial memory state's in a model of width 32 was seen to move by 9e-2.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-1}
# Of weights after the steps. fp32: each tensor. bf16: all weights together, because a gate bias that starts at zero has
# moved by a few steps of noisy sign and parts by half of its size.
WEIGHT_TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2}
LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}
# Adam's normaliser turns the rounding of an almost zero gradient into a step of full size; with the usual 1e-8, layouts
# part by the learning rate in single elements, and by 4e-5 of the loss after four steps.
REFEREE_EPS = 1e-4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data", type=int, default=1, help="data-parallel degree, without a launcher")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--rows", type=int, default=12, help="parameters to show, worst first")
    args = parser.parse_intermixed_args(argv)
    try:
        launch = launcher.from_environment(os.environ)
        config = load(args.config, args.overrides, check=False)
        world = launch.world_size
        if world == 1:
            world = config.parallel.tensor * config.parallel.pipeline * config.parallel.context * args.data
        check(config, world, args.config)
        if launch.world_size == 1 and world > 1:
            return start_processes(world, sys.argv[1:] if argv is None else argv)
        return judge(config, args)
    except (ConfigError, LaunchError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2


def check(config: Config, world: int, source: str) -> None:
    """Everything but the data files, which the referee does not read. Raises ConfigError."""
    try:
        validate(config, world, source)
    except ConfigError as error:
        rest = [problem for problem in error.problems if not problem[0].startswith("data.")]
        if rest:
            raise ConfigError(source, rest) from None


def start_processes(world: int, argv: list[str]) -> int:
    """The same command under torchrun on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*command, "-m", "parallel.parity", *argv], env=environment).returncode


def judge(config: Config, args: argparse.Namespace) -> int:
    """Run both sides in this process group, print the verdict on rank 0, agree on the exit code."""
    task = make_task(config, args.steps)
    with groups.start(config.parallel) as ranks:
        found = run_layout(config, task, ranks)
        equal = True
        if found is not None:
            verdict = compare(single_device(task, ranks.device), found, config.train.precision, args.tolerance)
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
        batches.append(TokenBatch(tokens[:-1], tokens[1:], starts))
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
    )
    return from_layout(task, replica, config.train.micro_batch)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference|; for a reference of zero, |ours|. NaN counts as infinite."""
    scale = reference.norm().item()
    error = (ours - reference).norm().item() / (scale or 1.0)
    return error if error == error else float("inf")


def compare(reference: Evidence, found: Evidence, precision: str, tolerance: float | None = None) -> dict[str, Any]:
    """The verdict: per parameter the worst gradient and weight error over its copies, losses, norms, and `equal`."""
    bound, loss_bound = tolerance or TOLERANCE[precision], max(tolerance or 0.0, LOSS_TOLERANCE[precision])
    missing = sorted(set(reference.weights) ^ set(found.weights))
    names = [name for name in reference.weights if name in found.weights]
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "gradient": max((relative(g, reference.gradients[name][0]) for g in found.gradients[name]), default=0.0),
            "weight": max(relative(w, reference.weights[name][0]) for w in found.weights[name]),
            "copies": len(found.weights[name]),
        }
        for name in names
    ]
    rows.sort(key=lambda row: -row["gradient"])
    pairs = list(zip(reference.losses, found.losses, strict=True))
    losses = [abs(a - b) / abs(a) if b == b else float("inf") for a, b in pairs]
    norms = [abs(a - b) / a for a, b in zip(reference.grad_norms, found.grad_norms, strict=True)]
    states = [abs(found.state_norms.get(k, 0.0) - v) / v for k, v in reference.state_norms.items()]
    exact = [*(row["gradient"] for row in rows), norms[0], *states]
    if precision == "bf16":  # later gradients are as noisy as the first; in fp32 they follow the weights
        exact += norms
    whole = relative(*(_flat([side.weights[name][0] for name in names]) for side in (found, reference)))
    moved = [whole] if precision == "bf16" else [*(row["weight"] for row in rows), *norms]
    weight_bound = max(tolerance or 0.0, WEIGHT_TOLERANCE[precision])
    equal = not missing and max(exact) <= bound and max(moved) <= weight_bound and max(losses) <= loss_bound
    return {
        "equal": equal,
        "tolerance": bound,
        "weight_tolerance": weight_bound,
        "loss_tolerance": loss_bound,
        "parameters": rows,
        "missing": missing,
        "losses": [{"one_device": a, "layout": b, "error": e} for (a, b), e in zip(pairs, losses, strict=True)],
        "weights_error": whole,
        "grad_norm_error": max(norms),
        "state_norm_error": max(states, default=0.0),
    }


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def table(verdict: dict[str, Any], rows: int) -> str:
    """The verdict for people, worst parameters first."""
    lines = [f"{'parameter':<48} {'gradient':>10} {'weight':>10}  copies"]
    for row in verdict["parameters"][:rows]:
        lines.append(f"{row['name']:<48} {row['gradient']:>10.1e} {row['weight']:>10.1e}  {row['copies']:>6}")
    left = len(verdict["parameters"]) - rows
    if left > 0:
        lines.append(f"... and {left} parameters with smaller errors")
    for step, loss in enumerate(verdict["losses"], start=1):
        lines.append(
            f"step {step}  one device {loss['one_device']:.7f}  layout {loss['layout']:.7f}  {loss['error']:.1e}"
        )
    sums = {"all weights": "weights_error", "gradient norm": "grad_norm_error", "memory states": "state_norm_error"}
    lines.append("  ".join(f"{label} {verdict[key]:.1e}" for label, key in sums.items()))
    if verdict["missing"]:
        lines.append("on one side only: " + ", ".join(verdict["missing"]))
    word = "EQUAL" if verdict["equal"] else "DIFFERENT"
    bounds = ("tolerance", "weight_tolerance", "loss_tolerance")
    lines.append(f"{word}  tolerances: gradients {verdict[bounds[0]]:g}, weights {verdict[bounds[1]]:g}, "
                 f"losses {verdict[bounds[2]]:g}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
