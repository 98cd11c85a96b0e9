"""What models keep of earlier sources when they learn several one after another (docs/continual.md).

    python benchmarks/continual.py --gpus 1 --jobs 4 --json docs/measurements/continual.json \\
        --source law LAW/train LAW/heldout --source code CODE/train CODE/heldout --source web WEB/train WEB/heldout
    python benchmarks/continual.py --table docs/measurements/continual.json

benchmarks/continual.yaml says which: Transformer++, HOPE with one, two and four clocks, and with levels in context.
Each has a grid of rates of the same size. The rates with the lowest held-out loss at the end, the mean over the
sources, are run with the other seeds. Sources are read in the order given, for equally many steps. As in
benchmarks/recipe.py, whose plans, slots and rows these are, one may stop at any time (`--seconds`) and go on later with
the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import recipe
from kept import ROWS, plan_of, refuse, rows_of
from recipe import Cell, Plan, Row, Runs, best, same_rates
from tables import markdown, spread

from hope.pipe import piped

SHOWN = ("forgetting", "backward_transfer", "forward_transfer", "retained")
Source = tuple[str, str, str]


class Phases(Runs):
    """Cells whose data are the sources of `args.source`, one after another."""

    def words(self, cell: Cell) -> list[str]:
        return [*recipe.words(self.plan, cell, ["", ""], Path(self.args.out)), *phases(self.args.source)]

    def measured(self, records: list[Row], diverged: bool) -> Row:
        """`matrix`: the losses of every source at every border; and the measures at the end."""
        prefix, names = "continual.loss.", [name for name, _, _ in self.args.source]
        if diverged:
            return {"heldout": None, "sources": names}
        borders = [record for record in records if record.get("phase") is not None]
        if [record["phase"] for record in borders] != list(range(len(names) + 1)):
            raise RuntimeError(f"borders {[r['phase'] for r in borders]} were measured, not 0 to {len(names)}")
        last = borders[-1]
        told = {
            key: value for key, value in last.items() if key.startswith("continual.") and not key.startswith(prefix)
        }
        return {
            "heldout": last["heldout_loss"], "sources": names,
            "matrix": [[record[prefix + name] for name in names] for record in borders],
            "measures": {key.removeprefix("continual."): value for key, value in told.items()},
        }  # fmt: skip


def phases(sources: list[Source]) -> list[str]:
    """Overrides that read (name, training set, held-out set) one after another, for equally many steps."""
    listed = [{"name": name, "train": train, "heldout": heldout, "weight": 1} for name, train, heldout in sources]
    return [f"data.sources={json.dumps(listed)}", "train.mode=continual"]


def table(plan: Plan, rows: list[Row]) -> str:
    """Markdown: every model at its best rates, mean and smallest to largest over its seeds; then source by source."""
    head = ["optimizer", "model", "parameters", "lr", "element-wise lr", "seeds", "held-out"]
    lines = [[*head, *(name.replace("_", " ") for name in SHOWN)]]
    detail = [["optimizer", "model", "source", "before its phase", "after it", "at the end"]]
    for optimizer, model in plan["order"]:
        chosen = best(plan, optimizer, model, rows)
        if chosen is None:
            grid = recipe.grid(plan, optimizer, model)
            done = sum(Cell.of(row) in grid for row in rows)
            told = f"{done} of {len(grid)} cells run" if done < len(grid) else "all diverged"
            lines.append([optimizer, model, *[""] * 4, told, *[""] * len(SHOWN)])
            continue
        same = same_rates(chosen, rows)
        rates = [f"{chosen['parameters'] / 1e6:.1f}M", f"{chosen['lr']:g}", f"{chosen['lr_elementwise']:g}"]
        figures = [spread([row["measures"].get(name) for row in same]) for name in SHOWN]
        lines.append([optimizer, model, *rates, str(len(same)), spread([r["heldout"] for r in same]), *figures])
        for number, name in enumerate(chosen["sources"]):
            seen = [[row["matrix"][phase][number] for row in same] for phase in (number, number + 1, -1)]
            detail.append([optimizer, model, name, *map(spread, seen)])
    return "\n\n".join(markdown(part) for part in (lines, detail) if len(part) > 1)


def rows_of_sources(path: Path, *, new: bool = False) -> list[Row]:
    """The rows in a file. Ends the program with 2 if a matrix is not of the row's sources, or rows differ in these."""
    rows = rows_of(path, new=new)
    for number, row in enumerate(rows, 1):
        names, matrix = row["sources"], row.get("matrix")
        if names != rows[0]["sources"]:
            refuse(path, f"row {number}: sources are {', '.join(names)}, those of row 1 are others", ROWS)
        if matrix is not None and [*map(len, matrix)] != [len(names)] * (len(names) + 1):
            refuse(path, f"row {number}: matrix is not {len(names) + 1} lists of {len(names)} losses", ROWS)
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.parser_of(__doc__, "continual")
    parser.add_argument("--source", nargs=3, action="append", default=[], metavar=("NAME", "TRAIN", "HELDOUT"))
    args = parser.parse_args(argv)
    if args.table:
        return args
    if len(args.source) < 2 or not args.json:
        parser.error("--source twice or more and --json are needed, or --table")
    given = [name for name, _, _ in args.source]
    others = {tuple(row["sources"]) for row in rows_of_sources(args.json, new=True)} - {tuple(given)}
    if others:
        parser.error(f"{args.json} has rows of {', '.join(others.pop())}, not of {', '.join(given)}: another --json")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    plan: Plan = plan_of(args.plan)
    if args.table:
        print(table(plan, rows_of_sources(args.table)))
        return 0
    return Phases(plan, args).told(partial(table, plan))


if __name__ == "__main__":
    sys.exit(piped(main))
