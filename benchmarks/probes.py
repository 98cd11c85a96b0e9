"""Probes that tell memories apart, for several models: accuracy at the best rate, against the bytes of a state.

    python benchmarks/probes.py --gpus 4 --jobs 4 --json docs/measurements/probes.json
    python benchmarks/probes.py --only needle --data TRAIN HELDOUT --tokenizer FILE --haystack FILE --json ...
    python benchmarks/probes.py --table docs/measurements/probes.json

benchmarks/probes.yaml says which, and probes_family.yaml (`--plan`) of the rest of the family. A cell is one model,
trained on one probe at one rate and seed by `python -m hope.evaluate probe`. Of needle it is a pair of runs:
`pretrain_hope.py` on --data, and then what the model finds in --haystack. As in benchmarks/recipe.py, one may stop at
any time (`--seconds`) and go on later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import recipe
from kept import plan_of, rows_of
from recipe import ROOT, Plan, Row, Runs, flat
from tables import markdown

from hope.pipe import piped

NEEDLE = "needle"


class Cell(NamedTuple):
    """One model on one probe; the rate of needle's is in its plan."""

    probe: str
    model: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.probe}_{self.model}_{self.rate:g}_{self.seed}"


class Probes(Runs):
    """Cells of probes in the slots of devices."""

    def cells(self) -> Iterator[Cell]:  # type: ignore[override]
        for probe in self.args.only:
            if probe == NEEDLE:
                yield from (Cell(NEEDLE, model, 0.0, 1) for model in self.plan[NEEDLE]["models"])
                continue
            how = self.plan["probes"][probe]
            for seed in how["seeds"]:
                yield from (Cell(probe, model, rate, seed) for rate in how["rates"] for model in how["models"])

    def cell_of(self, row: Row) -> Cell:  # type: ignore[override]
        return Cell(*(row[field] for field in Cell._fields))

    def run(self, cell: Cell, device: int) -> Row | None:  # type: ignore[override]
        """The row of a cell; None if there was no time for it. Raises RuntimeError: a program failed."""
        began, out = time.monotonic(), Path(self.args.out)
        try:
            found = self._needle(cell, device, out) if cell.probe == NEEDLE else self._probe(cell, device, out)
        except subprocess.TimeoutExpired:
            return None
        seconds = round(time.monotonic() - began, 1)
        print(f"{cell.name:<44} {mean_accuracy(found):.4f}  {seconds} s", flush=True)
        return {**cell._asdict(), **found, "seconds": seconds, "gpu": recipe.gpu_name(), "jobs": self.args.jobs}

    def _probe(self, cell: Cell, device: int, out: Path) -> Row:
        how, target = self.plan["probes"][cell.probe], out / f"{cell.name}.json"
        words = [str(ROOT / self.plan["config"]), *self.plan["common"], *flat(self.plan["models"][cell.model])]
        self._start([
            "-m", "hope.evaluate", "probe", cell.probe, *words, *how["options"], "--rates", str(cell.rate),
            "--seeds", str(cell.seed), "--json", str(target),
        ], cell, device)  # fmt: skip
        record = json.loads(target.read_text())
        (source,) = record["sources"].values()
        kept = {key: record["identity"][key] for key in ("steps", "batch")}
        return {**kept, "layers": record["identity"]["model"]["layers"], "tests": source["result"]}

    def _needle(self, cell: Cell, device: int, out: Path) -> Row:
        how, run, target = self.plan[NEEDLE], out / cell.name, out / f"{cell.name}.json"
        words = [*how["common"], *flat(how["models"][cell.model]), f"run.name={cell.name}", f"run.dir={out}",
                 f"data.train={self.args.data[0]}", f"data.heldout={self.args.data[1]}"]  # fmt: skip
        # the same command again goes on with a run that was cut, and leaves a finished one alone
        self._start([str(ROOT / "pretrain_hope.py"), str(ROOT / how["config"]), *words], cell, device)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self._start([
            "-m", "hope.evaluate", "probe", NEEDLE, str(run), *how["options"], "--tokenizer", str(self.args.tokenizer),
            "--haystack", str(self.args.haystack), "--json", str(target),
        ], cell, device)  # fmt: skip
        sources = json.loads(target.read_text())["sources"]
        return {
            "steps": max(record.get("step", 0) for record in records),
            "heldout": [r["heldout_loss"] for r in records if r.get("heldout_loss") is not None][-1],
            "tests": {name: source["result"] for name, source in sources.items()},
        }

    def _start(self, words: list[str], cell: Cell, device: int) -> None:
        """Raises RuntimeError: it failed; TimeoutExpired: no time is left."""
        log = Path(self.args.out) / f"{cell.name}.log"
        code = self.started(words, log, device)
        if code:
            raise RuntimeError(f"exit code {code}, see {log}")


def _accuracy(test: dict[str, Any]) -> float:
    return float(test["accuracy"]["value"])


def mean_accuracy(row: Row) -> float:
    """Over the tests of a cell."""
    return statistics.mean(_accuracy(test) for test in row["tests"].values())


def best_rows(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """By probe and model: its rows at the rate with the highest accuracy, averaged over tests and seeds."""
    found: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["probe"], row["model"]), {}).setdefault(row["rate"], []).append(row)
    return {
        pair: max(by_rate.values(), key=lambda same: statistics.mean(map(mean_accuracy, same)))
        for pair, by_rate in found.items()
    }


def table(rows: list[Row]) -> str:
    """Markdown: per probe a table of accuracies in percent, a column per test; with several seeds also their range."""
    parts, chosen = [], best_rows(rows)
    for probe in dict.fromkeys(row["probe"] for row in rows):
        models = {model: same for (name, model), same in chosen.items() if name == probe}
        tests = list(next(iter(models.values()))[0]["tests"])
        lines = [[probe, "rate", "seeds", *tests, "state bytes"]]
        for model, same in models.items():
            rate = f"{same[0]['rate']:g}" if same[0]["rate"] else ""
            sizes = [row["tests"][tests[0]].get("state_bytes") for row in same[:1]]
            size = f"{sizes[0]:,}" if sizes[0] else ""
            lines.append([model, rate, str(len(same)), *(_cell(same, test) for test in tests), size])
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def _cell(rows: list[Row], test: str) -> str:
    found = [100 * _accuracy(row["tests"][test]) for row in rows]
    span = f" ({min(found):.1f} - {max(found):.1f})" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{span}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.parser_of(__doc__, "probes")
    parser.add_argument("--only", nargs="+", metavar="PROBE", help="of the plan (default: all but needle)")
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "HELDOUT"), help="of needle's models")
    parser.add_argument("--tokenizer", type=Path, help="of needle's models")
    parser.add_argument("--haystack", type=Path, help="text of needle")
    args = parser.parse_args(argv)
    if args.table:
        return args
    plan: Plan = plan_of(args.plan)
    known = [*plan["probes"], NEEDLE]
    args.only = args.only or known[:-1]
    if not args.json:
        parser.error("--json is needed, or --table")
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only {unknown[0]}: {args.plan} has {', '.join(known)}")
    if NEEDLE in args.only and not (args.data and args.tokenizer and args.haystack):
        parser.error("needle needs --data, --tokenizer and --haystack")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.table:
        print(table(rows_of(args.table)))
        return 0
    return Probes(plan_of(args.plan), args).told(table)


if __name__ == "__main__":
    sys.exit(piped(main))
