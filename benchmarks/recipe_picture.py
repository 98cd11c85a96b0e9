"""Rows of benchmarks/recipe.py as a picture: `python benchmarks/recipe_picture.py ROWS OUT.svg [--optimizer muon]`.

A line per model, the best above. Pale dots: every cell of the grid, first seed. Dots: all seeds at the best rates, with
their mean. What is far to the right is pushed to the edge.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept import keep_picture, plan_of, rows_of
from recipe import ROOT, Cell, Plan, Row, grid

from hope.pipe import piped
from hope.train.plot.picture import COLOURS, PALE, Axis, Dot, Line, Picture, Words

NAMES = {
    "transformer": "Transformer++",
    "transformer_qk": "Transformer++, QK norm",
    "hope": "HOPE",
    "hope_hybrid": "HOPE, hybrid 3:1",
    "hope_hybrid_qk": "HOPE, hybrid 3:1, QK norm",
    "hope_attention": "HOPE-Attention",
    "hope_attention_qk": "HOPE-Attention, QK norm",
    "hope_mlp": "HOPE, mlp memories",
    "hope_erase_1.9": "HOPE, erase up to 1.9",
    "linear_attention": "Linear attention",
    "retnet": "RetNet",
    "mamba2": "Mamba-2",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "kda": "KDA",
    "samba": "Samba-like",
    "titans_lmm": "Titans LMM",
    "titans_mag": "Titans MAG",
    "titans_mal": "Titans MAL",
    "titans_mac": "Titans MAC",
    "ttt_linear": "TTT-Linear",
    "ttt_mlp": "TTT-MLP",
}
WIDTH, LEFT, RIGHT, TOP, HEIGHT_OF_ROW, BOTTOM = 760, 190, 90, 20, 40, 46
WIDEST = 0.35
"""Nats from the best model's mean to the right edge, at most."""


def lines(plan: Plan, rows: list[Row], optimizer: str) -> dict[str, tuple[list[float], list[float]]]:
    """By model, best first: losses of its grid's cells, and of all seeds at the best of them."""
    found = {}
    for model in plan["models"] if optimizer in plan["optimizers"] else ():
        cells = grid(plan, optimizer, model)
        own = [row for row in rows if (row["optimizer"], row["model"]) == (optimizer, model) and row["heldout"]]
        of_grid = [row for row in own if Cell.of(row) in cells]
        if not of_grid:
            continue
        best = Cell.of(min(of_grid, key=lambda row: row["heldout"]))._replace(seed=0)
        seeds = [row["heldout"] for row in own if Cell.of(row)._replace(seed=0) == best]
        found[model] = [row["heldout"] for row in of_grid], seeds
    return dict(sorted(found.items(), key=lambda item: statistics.mean(item[1][1])))


def draw(found: dict[str, tuple[list[float], list[float]]]) -> Picture:
    """Raises ValueError: there is nothing."""
    if not found:
        raise ValueError("no cell of the optimizer has a loss")
    means = {model: statistics.mean(seeds) for model, (_, seeds) in found.items()}
    low = min(min(cells) for cells, _ in found.values()) - 0.02
    high = min(max(max(cells) for cells, _ in found.values()), min(means.values()) + WIDEST) + 0.01
    height = TOP + HEIGHT_OF_ROW * len(found) + BOTTOM
    axis = Axis(low, high, LEFT, WIDTH - RIGHT)
    picture = Picture(WIDTH, height)
    for mark in axis.marks():
        x = axis.at(mark)
        picture.add(
            Line([(x, TOP), (x, height - BOTTOM)], PALE), Words(x, height - BOTTOM + 18, f"{mark:g}", anchor="middle")
        )
    picture.add(Words((LEFT + WIDTH - RIGHT) / 2, height - 8, "held-out loss in nats", anchor="middle"))
    for number, (model, (cells, seeds)) in enumerate(found.items()):
        y = TOP + HEIGHT_OF_ROW * (number + 0.5)
        colour = COLOURS[0] if model.startswith("hope") else COLOURS[1]
        picture.add(Words(LEFT - 10, y + 4, NAMES.get(model, model), anchor="end"))
        picture.add(*(Dot(axis.at(min(loss, high)), y, PALE, 4) for loss in cells))
        picture.add(*(Dot(axis.at(loss), y, colour, 3.5) for loss in seeds))
        x = axis.at(means[model])
        picture.add(Line([(x, y - 11), (x, y + 11)], colour, 2))
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        picture.add(Words(WIDTH - RIGHT + 10, y + 4, f"{means[model]:.3f}  {count}", colour))
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks/recipe.yaml")
    parser.add_argument("--optimizer", default="muon")
    args = parser.parse_args(argv)
    plan: Plan = plan_of(args.plan)
    found = lines(plan, rows_of(args.rows), args.optimizer)
    keep_picture(args.out, args.rows, lambda: draw(found))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
