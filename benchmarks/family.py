"""Every model in one table: held-out loss, tokens/s, bytes of state, and what probes say; with a picture of it.

    python benchmarks/family.py --recipe benchmarks/recipe_family.yaml docs/measurements/recipe_family.json \\
        --recipe benchmarks/recipe.yaml docs/measurements/recipe.json \\
        --throughput docs/measurements/throughput.json --where size=17m seq=1024 compile=dense cuda_graphs=true \\
        --probes docs/measurements/probes.json docs/measurements/probes_family.json \\
        --json docs/measurements/family.json --picture docs/family.svg

Rows come from recipe.py (`--recipe PLAN ROWS`, a model is in once its grid is complete), throughput.py and probes.py.
What nobody has measured is blank, also where a file is missing. Bytes of state are computed: what one sequence of the
plan's length leaves behind in all layers, with weights in bf16 and memories in fp32. All speeds must be of one setting:
`--where` chooses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import probes
import recipe
import torch
from family_picture import draw
from kept import keep, keep_text, pair, plan_of, rows_of
from recipe import Cell, Plan, Row
from throughput import SAME

from configs.errors import ConfigError
from hope.arguments import result_file
from hope.block import Block
from hope.config import ModelConfig
from hope.pipe import piped

ASKED = ("mqar", "parity", "s5")
SETTING = [key for key in SAME if key not in ("model", "heads", "hope")]
"""What speeds must agree in."""


def state_bytes(config: ModelConfig, length: int) -> int:
    """Of all layers after one sequence of `length` tokens; nothing is allocated."""
    total = 0
    with torch.device("meta"), torch.no_grad():
        x = torch.zeros(length, 1, config.width, dtype=torch.bfloat16)
        for name in set(config.mixer_of_layer):
            states = [part(x)[1] for part in Block(config, name).bfloat16().mixing().values()]
            total += config.mixer_of_layer.count(name) * sum(state.nbytes() for state in states if state is not None)
    return total


def losses(plan: Plan, rows: list[Row], optimizer: str) -> Iterator[Row]:
    """Of every model in the plan: what it is, and the losses of all seeds at the best rates of a complete grid."""
    for of, model in plan["order"]:
        if of != optimizer:
            continue
        cell = Cell(model, optimizer, 0.0, 0.0, 0)
        config, _ = recipe.config_of(plan, cell, recipe.words(plan, cell, ["-", "-"], Path("-")))
        chosen = recipe.best(plan, optimizer, model, rows)
        found = recipe.of_all_seeds(chosen, rows) if chosen else []
        yield {
            "model": model,
            "parameters": chosen["parameters"] if chosen else None,
            "heldout": statistics.mean(found) if found else None,
            "seeds": len(found),
            "smallest": min(found, default=None),
            "largest": max(found, default=None),
            "state_bytes": state_bytes(config.model, config.train.seq_len),
        }


def speeds(rows: list[Row], models: set[str], where: dict[str, Any]) -> dict[str, float]:
    """Tokens/s by model, of rows that agree with `where`.

    Raises:
        ValueError: those left are of several settings, or a model has several.
    """
    fit = [row for row in rows if row["model"] in models and "tokens_per_s" in row]
    fit = [row for row in fit if all(row.get(key) == value for key, value in where.items())]
    for key in SETTING:
        values = sorted({json.dumps(row.get(key)) for row in fit})
        if len(values) > 1:
            raise ValueError(f"speeds are of several settings, {key} {', '.join(values)}: --where {key}={values[0]}")
    for row in fit:
        same = [other for other in fit if other["model"] == row["model"]]
        if len(same) > 1:
            kinds = "; ".join(f"heads {other['heads']}, hope {other['hope']}" for other in same)
            raise ValueError(f"{row['model']} has {len(same)} speeds ({kinds}): --where heads={same[0]['heads']}")
    return {row["model"]: row["tokens_per_s"] for row in fit}


def joined(found: list[Row], speed: dict[str, float], asked: list[Row]) -> list[Row]:
    """A row per model, the best first, those without a loss last. Of a model in several plans the first with a loss."""
    accuracies = {
        pair: statistics.mean(probes.mean_accuracy(row) for row in rows)
        for pair, rows in probes.best_rows(asked).items()
    }
    found = sorted(found, key=lambda row: (row["heldout"] is None, row["heldout"]))
    first = {row["model"]: row for row in reversed(found)}
    return [
        {**row, "tokens_per_s": speed.get(name), **{probe: accuracies.get((probe, name)) for probe in ASKED}}
        for name, row in sorted(first.items(), key=lambda item: found.index(item[1]))
    ]


def table(rows: list[Row]) -> str:
    """Markdown; accuracies in percent, means over a probe's tests and seeds."""
    lines = [
        "| model | parameters | held-out | seeds | smallest - largest | tokens/s | state bytes | MQAR | parity | S5 |"
    ]
    lines.append("|---" * 10 + "|")
    shown = lambda value, form, factor=1.0: "" if value is None else format(factor * value, form)
    for row in rows:
        span = f"{row['smallest']:.3f} - {row['largest']:.3f}" if row["seeds"] else ""
        millions = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.1f}M"
        cells = [row["model"], millions, shown(row["heldout"], ".3f"), str(row["seeds"] or ""), span,
                 shown(row["tokens_per_s"], ",.0f"), f"{row['state_bytes']:,}",
                 *(shown(row[probe], ".1f", 100.0) for probe in ASKED)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read(paths: list[Path]) -> list[Row]:
    """All rows of the files that exist; of the others it says so."""
    rows: list[Row] = []
    for path in paths:
        if path.exists():
            rows += rows_of(path)
        else:
            print(f"no rows yet: {path}", file=sys.stderr)
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs=2, type=Path, action="append", required=True, metavar=("PLAN", "ROWS"))
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--throughput", nargs="*", type=Path, default=[], metavar="ROWS")
    parser.add_argument("--where", nargs="*", type=pair, default=[], metavar="KEY=VALUE", help="of its rows")
    parser.add_argument("--probes", nargs="*", type=Path, default=[], metavar="ROWS")
    parser.add_argument("--json", type=result_file, help="write the joined rows here")
    parser.add_argument("--picture", type=result_file, help="write an SVG here")
    args = parser.parse_args(argv)
    args.where = dict(args.where)
    if unknown := [key for key in args.where if key not in SAME]:
        parser.error(f"--where {unknown[0]}: rows have {', '.join(SAME)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        found = [row for plan, rows in args.recipe for row in losses(plan_of(plan), read([rows]), args.optimizer)]
        speed = speeds(read(args.throughput), {row["model"] for row in found}, args.where)
        rows = joined(found, speed, read(args.probes))
        picture = draw(rows).svg() if args.picture else None
    except (ValueError, ConfigError) as error:  # the latter of a plan's words
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        keep(args.json, rows)
    if picture:
        keep_text(args.picture, picture)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
