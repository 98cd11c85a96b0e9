"""Scale-out experiments and any other grid: `python -m launch sweep GRID.yaml`, restartable at any moment.

A cell is a run with a name of its own below the grid's folder. The sweep holds no state: a cell whose verdict is done
is skipped, one whose job is still in the queue is adopted, one that gave up is reported. At most `throttle` cells wait
or run at a time; on this machine (`where: local`) they run one after another.
"""

from __future__ import annotations

import time

from configs.errors import ConfigError
from hope.sections import Problem
from launch import slurm
from launch.folder import RunFolder, read_json
from launch.grid import Cell, Grid, all_cells, cell_config, why_left_out
from launch.local import local_request, run_here
from launch.placement import PlannedRun, Request, folder_of
from launch.plan import plan
from launch.submit import send

POLL_S = 2.0


def run_folder(grid: Grid, cell: Cell) -> RunFolder:
    """The folder of a cell's run."""
    return folder_of(cell_config(grid, cell))


def planned(grid: Grid, cell: Cell) -> PlannedRun:
    """The checked configuration and job of a cell. Raises ConfigError."""
    if grid.where == "local":
        request = local_request(grid.config, cell.overrides, cell.nodes)
    else:
        request = Request(grid.config, cell.overrides, grid.profile, cell.nodes)
    return plan(request, ask_slurm=False)  # a job that still waits or runs is adopted, not refused


def verdict(run: RunFolder) -> str:
    """done, stop, cancelled, requeue, or empty."""
    return str(read_json(run.verdict, {}).get("verdict", ""))


def devices_of(grid: Grid, given: int | None = None) -> int | None:
    """How many devices there are for a cell: those `given`, or this machine's GPUs; None where nothing limits it."""
    if given is not None or grid.where != "local":
        return given
    import torch  # takes 2 s that jobs of SLURM need not wait for

    return (
        torch.cuda.device_count() or None
    )  # without GPUs a rank is a process, of which there are as many as asked for


def run(grid: Grid, *, dry_run: bool = False, devices: int | None = None) -> int:
    """Bring every cell to a verdict; 0 if all are done, 1 if some gave up.

    devices: see `devices_of`.

    Raises:
        ConfigError: a cell cannot run; nothing was started.
    """
    limit = devices_of(grid, devices)
    todo, left_out = [], dict[str, list[str]]()
    for cell in all_cells(grid):
        if why := why_left_out(cell, limit):
            left_out.setdefault(why, []).append(cell.name)
        else:
            todo.append(cell)
    for why, names in left_out.items():
        print(f"sweep {grid.name}: left out, {why}: {', '.join(names)}")
    runs = _plan_all(grid, todo)
    if dry_run:
        for cell in todo:
            print(f"{cell.name:<32} {_verdict(runs, cell) or 'to do':<10} {' '.join(cell.overrides)}")
        return 0
    waiting = [cell for cell in todo if _verdict(runs, cell) not in ("done", "stop", "cancelled")]
    print(f"sweep {grid.name}: {len(todo)} cells, {len(todo) - len(waiting)} of them over", flush=True)
    if grid.where == "local":
        for cell in waiting:
            print(f"sweep: {cell.name}", flush=True)
            ended = run_here(runs[cell.name])
            if ended.stopped:  # by a signal: so is the sweep
                return ended.code or 1
    else:
        _run_jobs(waiting, runs, grid.throttle)
    bad = [cell.name for cell in todo if _verdict(runs, cell) != "done"]
    print(f"sweep {grid.name}: {len(todo) - len(bad)} of {len(todo)} cells done"
          + (f"; not: {', '.join(bad)}" if bad else ""))  # fmt: skip
    return 1 if bad else 0


def _verdict(runs: dict[str, PlannedRun], cell: Cell) -> str:
    return verdict(runs[cell.name].job.run)


def _plan_all(grid: Grid, todo: list[Cell]) -> dict[str, PlannedRun]:
    """Every cell's run by its name; the problems of all cells in one error."""
    runs, problems = {}, []
    for cell in todo:
        try:
            runs[cell.name] = planned(grid, cell)
        except ConfigError as error:
            problems += [Problem(f"{cell.name}: {path}", what, fix) for path, what, fix in error.problems]
    if problems:
        raise ConfigError(grid.file, problems)
    return runs


def _run_jobs(waiting: list[Cell], runs: dict[str, PlannedRun], throttle: int) -> None:
    """Keep `throttle` jobs in the queue until no cell is left; a job that an earlier sweep submitted is adopted."""
    live: dict[str, str] = {}
    for cell in waiting:
        if (number := slurm.newest_live(runs[cell.name].job.run.job_ids())) is not None:
            live[cell.name] = number
    queue = [cell for cell in waiting if cell.name not in live]
    while queue or live:
        while queue and len(live) < throttle:
            cell = queue.pop(0)
            live[cell.name] = send(runs[cell.name])
            print(f"sweep: {cell.name} is job {live[cell.name]}", flush=True)
        time.sleep(POLL_S)
        # a job of which SLURM says nothing counts as alive: it is asked again
        for name in [name for name, number in live.items() if slurm.ask(number).life == "ended"]:
            print(f"sweep: {name} {verdict(runs[name].job.run) or 'ended without a verdict'}", flush=True)
            del live[name]
