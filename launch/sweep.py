"""Scale-out experiments and any other grid: `python -m launch sweep GRID.yaml`, restartable at any moment.

A cell is a run with a name of its own below the grid's folder. The sweep holds no state: a cell whose verdict is done
is skipped, one whose job is still in the queue is adopted, one that gave up is reported. At most `throttle` cells wait
or run at a time; on this machine (`where: local`) they run one after another.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from configs.errors import ConfigError
from configs.given import gather
from configs.merge import BAD, Fitter, defaults, missing_paths
from configs.schema import Config
from configs.schema import load as load_config
from configs.source import plain
from hope.sections import Problem
from launch import profile, slurm
from launch.folder import RunFolder, read_json
from launch.local import local_request, run_here
from launch.placement import PlannedRun, Request, folder_of, split_overrides
from launch.plan import plan
from launch.profile import Profile
from launch.submit import send

POLL_S = 2.0


@dataclass(kw_only=True)
class Grid:
    """A sweep: `nodes` x `layouts` x every combination of `grid`, less what needs more devices than there are."""

    name: str
    """Folder of the cells' runs below the configuration's run.dir, and first part of their names."""
    config: str
    """The configuration that all cells start from."""
    overrides: list[str] = field(default_factory=list)
    """`a.b=c` for every cell, `site.key=value` for the profile."""
    where: Literal["slurm", "local"] = "slurm"
    """slurm: jobs; local: torchrun on this machine, where `nodes` counts processes."""
    profile: str = "h100"
    """Site profile of the jobs."""
    nodes: list[int] = field(default_factory=lambda: [1])
    """Numbers of nodes."""
    scaling: Literal["weak", "strong"] = "strong"
    """strong: train.global_batch is the same in every cell; weak: it grows with the nodes, from the smallest cell's."""
    layouts: list[dict[str, int]] = field(default_factory=lambda: [{}])
    """Degrees of the parallel section, [{tensor: 2}, {tensor: 2, pipeline: 2}]."""
    grid: dict[str, Any] = field(default_factory=dict)
    """{"optim.lr": [1e-3, 3e-3]}: every combination of the values."""
    throttle: int = 2
    """Jobs that wait or run at a time."""
    file: str = ""
    """Where this was read from; set by `load`."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    nodes: int
    layout: str
    series: str
    """The layout and the grid's values: what a line of the plot has in common."""
    degree: int
    """Devices of one model replica."""
    overrides: tuple[str, ...]


def load(path: str) -> Grid:
    """Read and check a sweep. Raises ConfigError with every problem."""
    problems: list[Problem] = []
    given = gather(path, (), set(), problems)
    if problems:
        raise ConfigError(path, problems)
    fitter = Fitter(Grid, given.place)
    good = fitter.fit(plain(given.values), Grid, "")
    problems += fitter.problems
    merged = OmegaConf.merge(defaults(Grid), {} if good is BAD else good)
    assert isinstance(merged, DictConfig)
    problems += [Problem(key, "required, but not given", "") for key in missing_paths(plain(merged))]
    if problems:
        raise ConfigError(path, problems)
    grid = OmegaConf.to_object(merged)
    assert isinstance(grid, Grid)
    problems += _problems(grid)
    if problems:
        raise ConfigError(path, problems)
    grid.file = path
    return grid


def _problems(grid: Grid) -> Iterator[Problem]:
    if not grid.nodes or min(grid.nodes) < 1:
        yield Problem("nodes", f"{grid.nodes}: need at least one number of nodes", "[1, 2, 4]")
    elif grid.scaling == "weak" and any(n % min(grid.nodes) for n in grid.nodes):
        yield Problem("nodes", f"{grid.nodes}: weak scaling multiplies the batch of the smallest", "[1, 2, 4]")
    if not grid.layouts:
        yield Problem("layouts", "is empty", "[{tensor: 1}]; or leave it out")
    for number, layout in enumerate(grid.layouts):
        for key in layout:
            if key not in ("tensor", "pipeline", "virtual_pipeline", "context"):
                yield Problem(f"layouts[{number}].{key}", "is no degree", "tensor, pipeline, virtual_pipeline")
    for key, values in grid.grid.items():
        if not isinstance(values, list) or not values:
            yield Problem(f"grid.{key}", f"{values!r} is not a list of values", "[1e-3, 3e-3]")
    if grid.throttle < 1:
        yield Problem("throttle", f"{grid.throttle} is less than 1", "2")
    if not re.fullmatch(r"[\w.-]+", grid.name):
        yield Problem("name", f"{grid.name!r} is not the name of one folder", "letters, digits, - and _")


def cells(grid: Grid) -> list[Cell]:
    """Every combination whose layout has room on its devices, smallest numbers of nodes first.

    Raises ConfigError if the configuration or the profile cannot be read.
    """
    each = 1 if grid.where == "local" else site_profile(grid).ranks_per_node
    return [cell for cell in _all_cells(grid) if cell.degree <= cell.nodes * each]


def site_profile(grid: Grid) -> Profile:
    """The profile of the sweep's jobs, with its overrides."""
    return profile.load(grid.profile, split_overrides(grid.overrides)[1])


def _all_cells(grid: Grid) -> list[Cell]:
    own, _ = split_overrides(grid.overrides)
    base = load_config(grid.config, own, check=False)
    folder = Path(base.run.dir) / grid.name
    found = []
    for nodes, layout, values in itertools.product(sorted(grid.nodes), grid.layouts, _combinations(grid.grid)):
        words = [f"run.dir={folder}"]
        words += [f"parallel.{key}={degree}" for key, degree in layout.items()]
        if grid.scaling == "weak":
            words.append(f"train.global_batch={base.train.global_batch * nodes // min(grid.nodes)}")
        words += [f"{key}={value}" for key, value in values.items()]
        short = _layout_name(layout)
        parts = [f"n{nodes}", short, *(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())]
        name = re.sub(r"[^\w.-]+", "-", "_".join(part for part in parts if part))
        series = " ".join([short, *(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())])
        degree = math.prod(layout.get(key, 1) for key in ("tensor", "pipeline", "context"))
        found.append(Cell(name, nodes, short, series, degree, (*grid.overrides, *words, f"run.name={name}")))
    return found


def _combinations(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _layout_name(layout: dict[str, int]) -> str:
    letters = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "context": "cp"}
    return "-".join(f"{letters[key]}{degree}" for key, degree in layout.items() if degree > 1) or "dp"


def cell_config(grid: Grid, cell: Cell) -> Config:
    """A cell's configuration, its keys and types checked. Raises ConfigError."""
    own, _ = split_overrides(cell.overrides)
    return load_config(grid.config, own, check=False)


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


def run(grid: Grid, *, dry_run: bool = False) -> int:
    """Bring every cell to a verdict; 0 if all are done, 1 if some gave up.

    Raises:
        ConfigError: a cell cannot run; nothing was started.
    """
    todo = cells(grid)
    left_out = [cell.name for cell in _all_cells(grid) if cell not in todo]
    if left_out:
        print(f"sweep {grid.name}: left out, too few devices for the layout: {', '.join(left_out)}")
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
