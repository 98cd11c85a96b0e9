"""The grid of a sweep: which runs it is made of, and what each of them overrides. Nothing is started here."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from launch import profile
from launch.placement import split_overrides
from launch.profile import Profile

DEGREES = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "context": "cp"}
BOTH = "both"


@dataclass(kw_only=True)
class Variant:
    """One of the models, or of whatever else needs several overrides at once."""

    name: str
    """Its name in the cells' names and in tables."""
    overrides: list[str] = field(default_factory=list)
    """`a.b=c`, or YAML files, behind those of the grid and of the layout."""
    layouts: list[str] = field(default_factory=list)
    """Names of the layouts it has (dp, tp2, tp2-sp, pp2-vpp2); empty: all."""
    nodes: list[int] = field(default_factory=list)
    """Numbers of nodes it runs on; empty: all."""


@dataclass(kw_only=True)
class Grid:
    """A sweep: `nodes` x `variants` x `layouts` x every combination of `grid`, less what has too few devices."""

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
    scaling: Literal["weak", "strong", "both"] = "strong"
    """strong: train.global_batch is the same in every cell; weak: it grows with the nodes, from the smallest cell's;
    both: cells of either kind, of which the smallest is one and the same."""
    variants: list[Variant] = field(default_factory=list)
    """Models by name, or other sets of overrides."""
    layouts: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """Degrees of the parallel section, and keys that go with them: [{tensor: 2, train.micro_batch: 8}, {pipeline: 2}].
    """
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
    devices: int
    """Of the whole run."""
    variant: str
    layout: str
    series: str
    """Variant, layout and the grid's values: what a line of the plot has in common."""
    scaling: str
    """weak or strong."""
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
    elif grid.scaling != "strong" and any(n % min(grid.nodes) for n in grid.nodes):
        yield Problem("nodes", f"{grid.nodes}: weak scaling multiplies the batch of the smallest", "[1, 2, 4]")
    bad_layouts = list(_layout_problems(grid))
    yield from bad_layouts or _variant_problems(grid)
    for key, values in grid.grid.items():
        if not isinstance(values, list) or not values:
            yield Problem(f"grid.{key}", f"{values!r} is not a list of values", "[1e-3, 3e-3]")
    if grid.throttle < 1:
        yield Problem("throttle", f"{grid.throttle} is less than 1", "2")
    if not re.fullmatch(r"[\w.-]+", grid.name):
        yield Problem("name", f"{grid.name!r} is not the name of one folder", "letters, digits, - and _")


def _layout_problems(grid: Grid) -> Iterator[Problem]:
    if not grid.layouts:
        yield Problem("layouts", "is empty", "[{tensor: 1}]; or leave it out")
    good = True  # so that each has a name
    for number, layout in enumerate(grid.layouts):
        for key, value in layout.items():
            path = f"layouts[{number}].{key}"
            wanted = bool if key == "sequence" else int
            if key in (*DEGREES, "sequence") and type(value) is not wanted:
                good = False
                yield Problem(path, f"is {value!r}", "true or false" if wanted is bool else "2")
            elif key not in (*DEGREES, "sequence") and "." not in key:
                good = False
                yield Problem(path, "is no degree", f"{', '.join(DEGREES)}, sequence; or section.key")
    for name, count in Counter(map(_layout_name, grid.layouts) if good else ()).items():
        if count > 1:
            yield Problem("layouts", f"{count} of them are called {name}", "one of them, or keys of `grid`")


def _variant_problems(grid: Grid) -> Iterator[Problem]:
    names = [variant.name for variant in grid.variants]
    layouts = list(map(_layout_name, grid.layouts))
    for number, variant in enumerate(grid.variants):
        path = f"variants[{number}]"
        if names.count(variant.name) > 1:
            yield Problem(f"{path}.name", f"{variant.name} is the name of several", "another one")
        for name in set(variant.layouts) - set(layouts):
            yield Problem(f"{path}.layouts", f"no layout is called {name}", ", ".join(layouts))
        for count in set(variant.nodes) - set(grid.nodes):
            yield Problem(f"{path}.nodes", f"{count} is not in `nodes`", f"of {grid.nodes}")


def cells(grid: Grid, devices: int | None = None) -> list[Cell]:
    """Every combination whose layout has room on its devices, smallest numbers of nodes first.

    devices: those that there are; cells that need more are left out too. None: as many as are asked for.

    Raises ConfigError if the configuration or the profile cannot be read.
    """
    return [cell for cell in all_cells(grid) if not why_left_out(cell, devices)]


def why_left_out(cell: Cell, devices: int | None) -> str:
    """Why a cell cannot run on the devices that it or this machine has; nothing if it can."""
    if cell.degree > cell.devices:
        return "too few devices for the layout"
    return f"more than the {devices} devices here" if devices is not None and cell.devices > devices else ""


def site_profile(grid: Grid) -> Profile:
    """The profile of the sweep's jobs, with its overrides."""
    return profile.load(grid.profile, split_overrides(grid.overrides)[1])


def all_cells(grid: Grid) -> list[Cell]:
    """Every combination, also those without room. Raises as `cells`."""
    each = 1 if grid.where == "local" else site_profile(grid).ranks_per_node
    own, _ = split_overrides(grid.overrides)
    base = functools.cache(lambda *words: load_config(grid.config, [*own, *words], check=False))  # some 50 ms each
    found = []
    for nodes, variant in itertools.product(sorted(grid.nodes), grid.variants or [Variant(name="")]):
        if variant.nodes and nodes not in variant.nodes:
            continue
        for layout, values in itertools.product(grid.layouts, _combinations(grid.grid)):
            if not variant.layouts or _layout_name(layout) in variant.layouts:
                start = base(*_own_keys(layout), *variant.overrides)
                make = functools.partial(_cell, grid, start, nodes, nodes * each, variant, layout, values)
                found += [make(kind) for kind in _kinds(grid, nodes)]
    return found


def _kinds(grid: Grid, nodes: int) -> tuple[str, ...]:
    """Of the smallest cell weak and strong scaling are the same."""
    if grid.scaling != BOTH:
        return (grid.scaling,)
    return ("weak",) if nodes == min(grid.nodes) else ("weak", "strong")


def _cell(
    grid: Grid,
    base: Config,
    nodes: int,
    devices: int,
    variant: Variant,
    layout: Mapping[str, Any],
    values: Mapping[str, Any],
    scaling: str,
) -> Cell:
    """`base`: the configuration of the grid, the variant and the layout's own keys."""
    words = [*(_word(key, value) for key, value in layout.items()), *variant.overrides]
    if scaling == "weak":
        words.append(f"train.global_batch={base.train.global_batch * nodes // min(grid.nodes)}")
    words += [_word(key, value) for key, value in values.items()]
    short = _layout_name(layout)
    chosen = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    strong = "strong" if grid.scaling == BOTH and scaling == "strong" else ""
    parts = [f"n{nodes}", short, variant.name, *chosen, strong]
    name = re.sub(r"[^\w.-]+", "-", "_".join(part for part in parts if part))
    folder = f"run.dir={Path(base.run.dir) / grid.name}"
    return Cell(
        name=name,
        nodes=nodes,
        devices=devices,
        variant=variant.name,
        layout=short,
        series=" ".join([*filter(None, [variant.name]), short, *(part.replace("-", " ", 1) for part in chosen)]),
        scaling=scaling,
        degree=math.prod(layout.get(key, 1) for key in ("tensor", "pipeline", "context")),
        overrides=(*grid.overrides, folder, *words, f"run.name={name}"),
    )


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _word(key: str, value: Any) -> str:
    path = key if "." in key else f"parallel.{key}"
    return f"{path}={str(value).lower() if isinstance(value, bool) else value}"


def _own_keys(layout: Mapping[str, Any]) -> list[str]:
    """What a layout says beside its degrees."""
    return [_word(key, value) for key, value in layout.items() if "." in key]


def _layout_name(layout: Mapping[str, Any]) -> str:
    parts = [f"{DEGREES[key]}{degree}" for key, degree in layout.items() if key in DEGREES and degree > 1]
    return "-".join([*parts, *(["sp"] if layout.get("sequence") else [])]) or "dp"


def cell_config(grid: Grid, cell: Cell) -> Config:
    """A cell's configuration, its keys and types checked. Raises ConfigError."""
    own, _ = split_overrides(cell.overrides)
    return load_config(grid.config, own, check=False)
