"""Scale-out on the GPUs of one host: the cells of a sweep's grid, measured without starting a run for each.

    python benchmarks/scale.py launch/sweeps/eight.yaml --devices 1 2 4 8 --json docs/measurements/scale.json
    python benchmarks/scale.py launch/sweeps/eight.yaml --devices 4 --only 'n4_dp_hope' 'n4_.*_hope' --budget 180
    python -m launch compare docs/measurements/scale.json

One group of processes per number of devices trains one cell's model after another, on random tokens, through the code
that a run uses (no data files are read): one step of warming up, then the median of `--steps`. Cells go in the order of
the grid, or of the patterns of --only, which are matched with the names that `launch sweep GRID --dry-run` lists. Rows
are those of `launch collect --json`, and are written as they come. A cell that fails, or takes longer than --limit, is
said and left out. After --budget seconds no further cell begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layouts import torchrun

from configs.errors import ConfigError
from configs.schema import validate_without_data
from hope.arguments import count, finite, result_file, whole
from hope.pipe import piped
from hope.sections import Problem
from launch import scaling
from launch.grid import Cell, Grid, all_cells, cell_config, cells, load, why_left_out
from launch.sweep import devices_of
from parallel.layout.topology import ParallelConfig


def worker(grid: Grid, names: list[str], steps: int, until: float) -> None:
    """One rank's part of all cells called `names`. Rank 0 says as JSON which begins, and what it found."""
    import torch
    from layouts import timed

    from parallel.start import groups

    by_name = {cell.name: cell for cell in cells(grid)}
    with groups.start(ParallelConfig(), timeout_s=600.0) as ranks:
        say = (lambda facts: print(json.dumps(facts), flush=True)) if ranks.rank == 0 else lambda facts: None
        gc.freeze()  # DeepSpeed collects garbage 14 times for every model, over all that was imported
        for name in names:
            if groups.from_first(time.time()) > until:
                say({"cell": name, "failed": "out of time"})
                continue
            say({"cell": name})
            config, reason = cell_config(grid, by_name[name]), ""
            try:
                found = timed(config, groups.in_another_layout(config.parallel, ranks), steps)
            except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:  # the others are worth their numbers
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason:
                print(f"rank {ranks.rank}: {name}: {reason}", file=sys.stderr, flush=True)
                _free()
            if groups.any_rank(bool(reason)):
                say({"cell": name, "failed": reason or "on another rank"})
            else:
                say({"cell": name, **found})


def _free() -> None:
    """Give back what a cell that failed held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def told(process: subprocess.Popen[str], limit: float) -> Iterator[dict[str, Any]]:
    """The JSON lines that it prints; it is ended when none comes for `limit` s. Other lines are passed on."""
    assert process.stdout is not None
    timer = threading.Timer(limit, process.terminate)
    timer.start()
    try:
        for line in process.stdout:
            if not line.startswith('{"cell"'):
                print(line, end="", file=sys.stderr, flush=True)
                continue
            timer.cancel()
            timer = threading.Timer(limit, process.terminate)
            timer.start()
            yield json.loads(line)
    finally:
        timer.cancel()
        process.wait()


def measure(args: argparse.Namespace, world: int, wanted: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """(cell, what was found or why not) of every cell; a group of processes that dies in one is started again."""
    left = {cell.name: cell for cell in wanted}
    while left:
        own = [__file__, args.grid, "--worker", *left, "--steps", str(args.steps), "--until", str(args.until)]
        own += ["--set", *args.set] if args.set else []
        process = torchrun(world, own)
        current = next(iter(left))
        for facts in told(process, args.limit):
            current = facts["cell"]
            if len(facts) > 1:
                yield left.pop(current), facts
        if left:  # it died, or was ended, in the cell that it had begun
            current = current if current in left else next(iter(left))
            why = f"ended with code {process.returncode}, or no answer for {args.limit:.0f} s"
            yield left.pop(current), {"failed": why}


def chosen(args: argparse.Namespace, every: list[Cell], world: int) -> list[Cell]:
    """Those of `every` cell that have so many devices, in the order in which they are worth their time."""
    fitting = [cell for cell in every if cell.devices == world and not why_left_out(cell, world)]
    if not args.only:
        return fitting
    ranked = [cell for pattern in args.only for cell in fitting if re.fullmatch(pattern, cell.name)]
    return list(dict.fromkeys(ranked))


def check(grid: Grid, wanted: list[Cell], patterns: list[str]) -> None:
    """Raises ConfigError: some cells cannot run, or a pattern is of none."""
    problems = [
        Problem("--only", f"{pattern} is the name of no cell here", f"launch sweep {grid.file} --dry-run")
        for pattern in patterns
        if not any(re.fullmatch(pattern, cell.name) for cell in wanted)
    ]
    for cell in wanted:
        try:
            validate_without_data(cell_config(grid, cell), cell.devices, grid.file)
        except ConfigError as error:
            problems += [Problem(f"{cell.name}: {path}", what, fix) for path, what, fix in error.problems]
    if problems:
        raise ConfigError(grid.file, problems)


def line(row: scaling.Row, facts: dict[str, Any]) -> str:
    """A row of the table."""
    seconds = facts["seconds"][1:]
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    share = "" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
    return (f"| {row['cell']} | {row['global_batch']} | {row['tokens_per_s']:,.0f} | {share} | {peak} | "
            f"{min(seconds):.2f} - {max(seconds):.2f} |")  # fmt: skip


def run(args: argparse.Namespace, grid: Grid) -> int:
    """Measure, print and write; 1 if a cell has no number."""
    limit = devices_of(grid)
    worlds = args.devices or [n for n in sorted(grid.nodes) if limit is None or n <= limit]
    every = all_cells(grid)  # takes seconds
    gone = [cell.name for cell in every if cell.devices not in worlds or why_left_out(cell, limit)]
    if gone:
        print(f"scale: left out, for {', '.join(map(str, worlds))} devices only: {len(gone)} cells of the grid")
    by_world = {world: chosen(args, every, world) for world in worlds}
    if args.json and args.json.exists():
        scaling.read(args.json)  # before hours of measurements, which could not be added to what is no rows
    check(grid, [cell for wanted in by_world.values() for cell in wanted], args.only)
    print(
        "| cell | sequences | tokens/s | of one device, each | GiB | s per step |\n|---|---|---|---|---|---|",
        flush=True,
    )
    rows, failed = list[scaling.Row](), 0
    for world, wanted in by_world.items():
        for cell, facts in measure(args, world, wanted):
            if "failed" in facts:
                failed += 1
                print(f"| {cell.name} | not measured: {facts['failed']} | | | | |", flush=True)
                continue
            speed, peak, gpu = facts["tokens_per_s"], facts["peak_gib"] or None, facts["device"]
            row = scaling.row(grid, cell, tokens_per_s=speed, peak_gib=peak, gpu=gpu)
            rows = scaling.with_efficiency([*rows, {**row, "seconds": facts["seconds"]}])
            print(line(rows[-1], facts), flush=True)
            if args.json:
                scaling.write(args.json, rows)
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="YAML file of launch/sweeps/ with `where: local`")
    parser.add_argument("--devices", nargs="+", type=count, default=[], help="numbers of them; default: all that fit")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cells, best first")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="behind the grid's own overrides")
    parser.add_argument("--steps", type=whole(), default=3, help="timed steps")
    parser.add_argument("--limit", type=finite, default=90.0, help="seconds for one cell, and for the start")
    parser.add_argument("--budget", type=finite, default=3600.0, help="seconds after which no cell begins")
    parser.add_argument("--json", type=result_file, help="rows are added here; an equal measurement is replaced")
    parser.add_argument("--worker", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=finite, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        grid = load(args.grid)
        grid.overrides += args.set
        if args.worker:
            worker(grid, args.worker, args.steps, args.until)
            return 0
        if grid.where != "local":
            parser.error(f"{args.grid} is not `where: local`")
        args.until = time.time() + args.budget
        return run(args, grid)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(piped(main))
