"""Steps until held-out loss reaches a target, per optimizer: what a plan of benchmarks/recipe.py has trained.

    python benchmarks/steps_to.py --plan benchmarks/recipe_dmgd.yaml --json docs/measurements/recipe_dmgd.json \
        --out runs/recipe_dmgd --model transformer --of adamw

Reads metrics.jsonl of the seeds at the best rates of each. The target is what all seeds of `--of` end at or below: the
worst of their last held-out losses, or `--target`. Between two evaluations the loss is taken to be linear in the step.
A seed that never gets there has no number, and is counted. t is Welch's, of the steps against those of `--of`
(negative: fewer steps), with its degrees of freedom (Welch, 1947) and the two-sided probability of one as large.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curves import series
from kept import plan_of, rows_of
from recipe import ROOT, Cell, best

from hope.arguments import finite
from hope.pipe import piped
from hope.train.plot.curves import NoCurve

Curve = list[tuple[int, float]]


class Welch(NamedTuple):
    """t of the difference of two means, its degrees of freedom, and P(|T| >= |t|)."""

    t: float
    freedom: float
    p: float


def first_step(curve: Curve, target: float) -> float | None:
    """Where held-out loss [(step, nats), ...] is first at the target, or None."""
    for (before, high), (step, loss) in zip([curve[0], *curve], curve, strict=False):
        if loss <= target:
            return float(step) if high <= target else before + (step - before) * (high - target) / (high - loss)
    return None


def welch(a: Sequence[float], b: Sequence[float]) -> Welch | None:
    """Of two samples with unequal variances; None where one of them has fewer than two, or nothing varies."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = (statistics.variance(x) / len(x) for x in (a, b))
    if not va + vb:
        return None
    t = (statistics.mean(a) - statistics.mean(b)) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Welch(t, freedom, two_sided(t, freedom))


def two_sided(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's distribution.

    T = sqrt(n) tan(x) has a density proportional to cos(x)^(n - 1) in x, on an interval that ends: Simpson's rule.
    """
    inside = _simpson(freedom, math.atan(abs(t) / math.sqrt(freedom)))
    return max(0.0, 1 - inside / _simpson(freedom, math.pi / 2))


def _simpson(freedom: float, end: float, parts: int = 20_000) -> float:
    f = lambda x: max(0.0, math.cos(x)) ** (freedom - 1)
    points = [f(end * i / parts) for i in range(parts + 1)]
    return end / parts / 3 * (points[0] + points[-1] + 4 * sum(points[1::2]) + 2 * sum(points[2:-1:2]))


def curves(plan: dict[str, Any], rows: list[dict[str, Any]], model: str, out: Path) -> dict[str, list[Curve]]:
    """Held-out losses of every seed at the best rates, by optimizer; of those whose folder is there."""
    found: dict[str, list[Curve]] = {}
    for optimizer, name in plan["order"]:
        chosen = best(plan, optimizer, name, rows) if name == model else None
        if chosen is None:
            continue
        cells = [Cell.of(chosen)._replace(seed=seed) for seed in plan["seeds"]]
        folders = [out / cell.name for cell in cells if (out / cell.name / "metrics.jsonl").exists()]
        found[optimizer] = [held for folder in folders if len(held := series(folder)[1]) > 1]
    return found


def table(found: dict[str, list[Curve]], target: float, of: str) -> str:
    """Markdown."""
    steps = {name: [first_step(curve, target) for curve in own] for name, own in found.items()}
    reached = {name: [step for step in own if step is not None] for name, own in steps.items()}
    lines = [f"Steps to a held-out loss of {target:.3f}", ""]
    lines += [f"| optimizer | seeds there | mean | smallest - largest | against {of} | t | df | p |", "|---" * 8 + "|"]
    for name, own in reached.items():
        row = [name, f"{len(own)} of {len(steps[name])}", "", "", "", "", "", ""]
        if own:
            row[2:4] = [f"{statistics.mean(own):.0f}", f"{min(own):.0f} - {max(own):.0f}"]
        if own and reached.get(of) and name != of:
            row[4] = f"{statistics.mean(own) / statistics.mean(reached[of]):.2f}"
        if name != of and (test := welch(own, reached.get(of, []))):
            row[5:] = [f"{test.t:.1f}", f"{test.freedom:.1f}", f"{test.p:.2g}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/recipe_dmgd.yaml")
    parser.add_argument("--json", type=Path, required=True, help="rows of the plan")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--of", default="adamw", help="the optimizer that the others are compared with")
    parser.add_argument("--target", type=finite, help="nats; by default the worst last loss of --of")
    args = parser.parse_args(argv)
    plan = plan_of(args.plan)
    try:
        found = curves(plan, rows_of(args.json), args.model, args.out)
    except NoCurve as error:
        parser.error(str(error))
    if not found.get(args.of):
        parser.error(f"{args.out} has no runs of {args.of} with {args.model} at the best rates of a complete grid")
    target = max(curve[-1][1] for curve in found[args.of]) if args.target is None else args.target
    print(table(found, target, args.of))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
