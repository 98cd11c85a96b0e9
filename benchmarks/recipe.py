"""Models compared at the best learning rates of each: grids of equal size, then further seeds at the best of a grid.

    python benchmarks/recipe.py --data TRAIN HELDOUT --gpus 2 --jobs 4 --json docs/measurements/recipe.json
    python benchmarks/recipe.py --table docs/measurements/recipe.json

benchmarks/recipe.yaml says which. A cell is one run of `pretrain_hope.py`. Its row is written when it ends, and cells
that have a row are not run again, so that one may stop at any time (`--seconds`) and go on later. Grids are run in the
order of the file. As soon as one is complete, its best rates are run with the other seeds. Other plans (`--plan`):
recipe_dmgd.yaml, recipe_ablation.yaml, recipe_position.yaml, recipe_family.yaml. A plan may have `eval_every` and
`checkpoint_every`, in steps, 0 by default. Rates may come from shorter runs, whose plan and rows `--tuned` names. Every
model then has one cell, as soon as those have found its rates:

    python benchmarks/recipe.py --plan benchmarks/recipe_100m_tune.yaml --json tune.json --data ...
    python benchmarks/recipe.py --plan benchmarks/recipe_100m.yaml --json ... --data ... \\
        --tuned benchmarks/recipe_100m_tune.yaml tune.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept import keep, plan_of, rows_of

from configs.schema import Config, load
from hope.arguments import count, result_file
from hope.matched import matched_hidden, parameters
from hope.pipe import piped
from parallel.exits import DO_NOT_RESTART

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Plan = dict[str, Any]
SHORTEST = 60  # seconds left under which no cell is begun


class Cell(NamedTuple):
    """One run."""

    model: str
    optimizer: str
    lr: float
    lr_elementwise: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model}_{self.optimizer}_{self.lr:g}_{self.lr_elementwise:g}_{self.seed}"

    @staticmethod
    def of(row: Row) -> Cell:
        return Cell(*(row[field] for field in Cell._fields))


def grid(plan: Plan, optimizer: str, model: str) -> list[Cell]:
    """All rates, with the first seed."""
    if (tuned := plan.get("tuned")) is not None:
        found = tuned.get((optimizer, model))
        return [Cell(model, optimizer, *found, plan["seeds"][0])] if found else []
    rates = plan["optimizers"][optimizer]
    pairs = product(rates["lr"], rates["lr_elementwise"])
    return [Cell(model, optimizer, lr, elementwise, plan["seeds"][0]) for lr, elementwise in pairs]


def best(plan: Plan, optimizer: str, model: str, rows: list[Row]) -> Row | None:
    """The row with the lowest held-out loss of a grid, None while it is incomplete. One that diverged has no loss."""
    found = {Cell.of(row): row for row in rows}
    cells = grid(plan, optimizer, model)
    if any(cell not in found for cell in cells):
        return None
    trained = [found[cell] for cell in cells if found[cell]["heldout"] is not None]
    return min(trained, key=lambda row: row["heldout"], default=None)


def same_rates(chosen: Row, rows: list[Row]) -> list[Row]:
    """The rows of all seeds at the rates of a row, without those that diverged."""
    same = [row for row in rows if Cell.of(row)._replace(seed=0) == Cell.of(chosen)._replace(seed=0)]
    return [row for row in same if row["heldout"] is not None]


def of_all_seeds(chosen: Row, rows: list[Row]) -> list[float]:
    """Held-out losses at the rates of a row."""
    return [row["heldout"] for row in same_rates(chosen, rows)]


def tuned_rates(plan: Plan, rows: list[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """By optimizer and model: the best rates of every grid that is complete."""
    chosen = {(optimizer, model): best(plan, optimizer, model, rows) for optimizer, model in plan["order"]}
    return {pair: (row["lr"], row["lr_elementwise"]) for pair, row in chosen.items() if row}


def cells(plan: Plan, rows: list[Row]) -> Iterator[Cell]:
    """Every cell that is known to be wanted, most worth first."""
    for optimizer, model in plan["order"]:
        yield from grid(plan, optimizer, model)
        if chosen := best(plan, optimizer, model, rows):
            for seed in plan["seeds"][1:]:
                yield Cell.of(chosen)._replace(seed=seed)


def flat(items: list[Any]) -> list[str]:
    """Words of a model, which a plan may have put together from anchors: lists within lists."""
    return [word for item in items for word in (flat(item) if isinstance(item, list) else [item])]


def words(plan: Plan, cell: Cell, data: list[str], folder: Path) -> list[str]:
    """What `pretrain_hope.py` is given after the configuration's file."""
    return [
        *plan["common"], *plan["optimizers"][cell.optimizer]["set"], *flat(plan["models"][cell.model]),
        f"optim.lr={cell.lr}", f"optim.lr_elementwise={cell.lr_elementwise}",
        f"run.name={cell.name}", f"run.dir={folder}", f"run.seed={cell.seed}", f"data.seed={cell.seed}",
        f"data.train={data[0]}", f"data.heldout={data[1]}",
        f"train.eval_every={plan.get('eval_every', 0)}", f"checkpoint.every={plan.get('checkpoint_every', 0)}",
        "log.tensorboard=false", "log.histograms=0",
    ]  # fmt: skip


def config_of(plan: Plan, cell: Cell, given: list[str]) -> tuple[Config, list[str]]:
    """The configuration of a cell, and the words that make it: the MLPs of all models but the first match it."""
    path = str(ROOT / plan["config"])
    first = load(path, words(plan, cell._replace(model=next(iter(plan["models"]))), ["-", "-"], Path("-")), check=False)
    config = load(path, given, check=False)
    wanted = parameters(first.model)
    hidden = matched_hidden(config.model, wanted)
    given = [*given, f"model.cms.hidden={hidden}"]
    return load(path, given, check=False), given


class Runs:
    """Cells shared out over slots of devices; rows go to a file as they come."""

    def __init__(self, plan: Plan, args: argparse.Namespace) -> None:
        self.plan, self.args, self.began = plan, args, time.monotonic()
        self.rows: list[Row] = rows_of(args.json, new=True)
        self.going: set[Cell] = set()
        self.failed: set[Cell] = set()
        self.changed = threading.Condition()

    def cells(self) -> Iterator[Cell]:
        """Every cell that is known to be wanted."""
        return cells(self.plan, self.rows)

    def cell_of(self, row: Row) -> Cell:
        """What a row is of."""
        return Cell.of(row)

    def words(self, cell: Cell) -> list[str]:
        """What `pretrain_hope.py` is given for a cell, the width of its MLPs apart."""
        return words(self.plan, cell, self.args.data, Path(self.args.out))

    def measured(self, records: list[Row], diverged: bool) -> Row:
        """What a row has of a run's metrics; `heldout`, by which rates are chosen, among it: None if it diverged."""
        losses = [record["heldout_loss"] for record in records if record.get("heldout_loss") is not None]
        return {"heldout": None if diverged else losses[-1]}

    def left(self) -> float:
        return float(self.args.seconds) - (time.monotonic() - self.began)

    def next(self) -> Cell | None:
        """The next cell; waits while the end of another may call for more. None: nothing is left, or no time."""
        with self.changed:
            while self.left() > SHORTEST:
                done = {self.cell_of(row) for row in self.rows} | self.going | self.failed
                todo = next((cell for cell in self.cells() if cell not in done), None)
                if todo:
                    self.going.add(todo)
                    return todo
                if not self.going:
                    return None
                self.changed.wait(timeout=1.0)
        return None

    def all(self) -> None:
        """In every slot of every device at once, until nothing is left or no time."""
        slots = [threading.Thread(target=self.work, args=(slot,)) for slot in range(self.args.gpus * self.args.jobs)]
        for slot in slots:
            slot.start()
        for slot in slots:
            slot.join()

    def told(self, table: Callable[[list[Row]], str]) -> int:
        """All cells, then the table of their rows; 1 if one failed."""
        Path(self.args.out).mkdir(parents=True, exist_ok=True)
        self.all()
        print(table(self.rows))
        if self.rows:
            keep(self.args.json, self.rows)
        return int(bool(self.failed))

    def work(self, slot: int) -> None:
        """Of one slot."""
        while (cell := self.next()) is not None:
            row = None
            try:
                row = self.run(cell, slot % self.args.gpus)
            except Exception as error:  # the others are still worth their numbers
                print(f"{cell.name}: {error}", flush=True)
                self.failed.add(cell)
            with self.changed:
                self.going.discard(cell)
                if row:
                    self.rows.append(row)
                    self._save()
                self.changed.notify_all()

    def _save(self) -> None:
        """A full disk is no reason to end: the rows are written with the next one, and once more at the end."""
        try:
            keep(self.args.json, self.rows)
        except SystemExit:
            print(f"{self.args.json}: its rows are kept in memory, and written with the next", flush=True)

    def environment(self, device: int) -> dict[str, str]:
        """Of a process that has one of the devices."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.args.gpus)))).split(",")
        return os.environ | {"CUDA_VISIBLE_DEVICES": visible[device % len(visible)], "OMP_NUM_THREADS": "1"}

    def started(self, words: list[str], log: Path, device: int) -> int:
        """Exit code of a Python program on a device, which prints to `log`. Raises TimeoutExpired: no time is left."""
        with log.open("a") as file:
            return subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=self.environment(device), timeout=self.left(),
            ).returncode  # fmt: skip

    def run(self, cell: Cell, device: int) -> Row | None:
        """The row of a run; None if there was no time for it. Raises RuntimeError: it neither ended nor diverged."""
        out = Path(self.args.out)
        config, given = config_of(self.plan, cell, self.words(cell))
        log, began = out / f"{cell.name}.log", time.monotonic()
        try:
            code = self.started([str(ROOT / "pretrain_hope.py"), str(ROOT / self.plan["config"]), *given], log, device)
        except subprocess.TimeoutExpired:
            return None
        diverged = code == DO_NOT_RESTART
        if code and not diverged:
            raise RuntimeError(f"exit code {code}, see {log}")
        records = [json.loads(line) for line in (out / cell.name / "metrics.jsonl").read_text().splitlines()]
        train, last = config.train, [r for r in records if r.get("tokens")][-1]
        evaluated = [record["step"] for record in records if record.get("heldout_loss") is not None]
        if not diverged and evaluated[-1:] != [train.total_steps]:  # told to end during its last evaluation
            raise RuntimeError(f"no held-out loss of its last step: remove {out / cell.name} and start again")
        row = cell._asdict() | {
            "parameters": parameters(config.model), "tokens": train.total_steps * train.tokens_per_step,
            **self.measured(records, diverged),
            "seconds": round(time.monotonic() - began, 1),
            "train_loss": last.get("loss"), "gpu": gpu_name(), "jobs": self.args.jobs,
        }  # fmt: skip
        print(f"{cell.name:<44} {row['heldout']}  {row['seconds']} s", flush=True)
        return row


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def table(plan: Plan, rows: list[Row]) -> str:
    """Markdown: every pair's best rates, and the mean and spread of its seeds at these."""
    lines = ["| optimizer | model | parameters | lr | element-wise lr | held-out | seeds | smallest - largest |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for optimizer, model in plan["order"]:
        chosen = best(plan, optimizer, model, rows)
        if chosen is None:
            done = sum(Cell.of(row) in grid(plan, optimizer, model) for row in rows)
            lines.append(
                f"| {optimizer} | {model} | | | | {done} of {len(grid(plan, optimizer, model))} cells run | | |"
            )
            continue
        losses = of_all_seeds(chosen, rows)
        lines.append(
            f"| {optimizer} | {model} | {chosen['parameters'] / 1e6:.1f}M | {chosen['lr']:g} | "
            f"{chosen['lr_elementwise']:g} | {statistics.mean(losses):.3f} | {len(losses)} | "
            f"{min(losses):.3f} - {max(losses):.3f} |"
        )
    return "\n".join(lines)


def parser_of(about: str | None, name: str) -> argparse.ArgumentParser:
    """What every comparison by cells is asked, but for its data; `name`: of its plan, and of its runs' folder."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=ROOT / f"benchmarks/{name}.yaml")
    parser.add_argument("--out", default=f"runs/{name}", help="folder of the runs")
    parser.add_argument("--json", type=result_file, help="rows that are there are kept")
    parser.add_argument("--gpus", type=count, default=1)
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time on one device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="until what is not done is left alone")
    parser.add_argument("--table", type=Path, help="print the table of such a file, run nothing")
    return parser


def with_data(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What is given to a comparison whose cells have one training and one held-out set."""
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "HELDOUT"))
    args = parser.parse_args(argv)
    if not args.table and not (args.data and args.json):
        parser.error("--data and --json are needed, or --table")
    return args


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "recipe")
    parser.add_argument("--tuned", nargs=2, type=Path, metavar=("PLAN", "ROWS"), help="rates are the best of these")
    return with_data(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    plan: Plan = plan_of(args.plan)
    if args.tuned:
        of, rows = args.tuned
        plan["tuned"] = tuned_rates(plan_of(of), rows_of(rows))
    if args.table:
        print(table(plan, rows_of(args.table)))
        return 0
    return Runs(plan, args).told(partial(table, plan))


if __name__ == "__main__":
    sys.exit(piped(main))
