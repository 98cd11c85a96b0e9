"""How far back a carried state helps: held-out loss by the tokens that stand before a window (docs/data_training.md).

    python benchmarks/stream.py --data TRAIN HELDOUT --gpus 1 --jobs 2 --json docs/measurements/stream.json
    python benchmarks/stream.py --table docs/measurements/stream.json

benchmarks/stream.yaml says which models, and the `reaches`. As in benchmarks/recipe.py, whose plans, slots and rows
these are, each has a grid of rates of the same size, the best of which is run with the other seeds, and one may stop at
any time (`--seconds`). The rate is chosen by the loss in windows that begin anew, as ever. Then every run is asked by
`python -m hope.evaluate` for all tokens of HELDOUT in windows whose first tokens, the reach, are context only. The last
figure is a single pass with the state carried from the first token on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import recipe
from kept import plan_of, rows_of
from recipe import Cell, Plan, Row, Runs, best, same_rates
from tables import markdown, spread

from configs.schema import load
from hope.pipe import piped

ALL = "all"


class Reaches(Runs):
    """Cells whose rows also have the loss by reach: nats per token with their standard errors."""

    def run(self, cell: Cell, device: int) -> Row | None:
        """As of every cell; `reach`: by number of tokens, and of the whole text. Absent from one that diverged."""
        row = super().run(cell, device)
        if row is None or row["heldout"] is None:
            return row
        window = load(str(recipe.ROOT / self.plan["config"]), list(self.plan["common"]), check=False).train.seq_len
        try:
            asked = {str(reach): self._asked(cell, device, ways(window, reach)) for reach in self.plan["reaches"]}
            return row | {"reach": asked | {ALL: self._asked(cell, device, ["--carry"])}}
        except subprocess.TimeoutExpired:
            return None

    def _asked(self, cell: Cell, device: int, how: list[str]) -> dict[str, Any]:
        out = Path(self.args.out)
        log, target = out / f"{cell.name}.log", out / f"{cell.name}{''.join(how)}.json"
        given = ["--tokens", f"heldout={self.args.data[1]}", "--json", str(target)]
        if code := self.started(["-m", "hope.evaluate", str(out / cell.name), *given, *how], log, device):
            raise RuntimeError(f"exit code {code}, see {log}")
        found: dict[str, Any] = json.loads(target.read_text())["sources"]["heldout"]["result"]["nats_per_token"]
        return found


def ways(window: int, reach: int) -> list[str]:
    """Options of windows that score `window` tokens behind `reach` others."""
    return ["--window", str(reach + window), "--stride", str(window)]


def table(plan: Plan, rows: list[Row]) -> str:
    """Markdown: every model at its best rates, mean and smallest to largest over its seeds, a column per reach."""
    names = list(next((row["reach"] for row in rows if "reach" in row), {}))
    lines = [["model", "parameters", "lr", "seeds", *names]]
    for optimizer, model in plan["order"]:
        chosen = best(plan, optimizer, model, rows)
        if chosen is None:
            done = sum(row["model"] == model for row in rows)
            lines.append([model, "", "", f"{done} cells run", *[""] * len(names)])
            continue
        same = [row for row in same_rates(chosen, rows) if "reach" in row]
        figures = [spread([row["reach"][name]["value"] for row in same]) for name in names]
        lines.append([model, f"{chosen['parameters'] / 1e6:.1f}M", f"{chosen['lr']:g}", str(len(same)), *figures])
    return markdown(lines)


def main(argv: list[str] | None = None) -> int:
    args = recipe.with_data(recipe.parser_of(__doc__, "stream"), argv)
    plan: Plan = plan_of(args.plan)
    if args.table:
        print(table(plan, rows_of(args.table)))
        return 0
    return Reaches(plan, args).told(partial(table, plan))


if __name__ == "__main__":
    sys.exit(piped(main))
