"""Rows of a scale-out measurement as JSON: what `collect --json` and benchmarks/scale.py write, and `compare` reads.

A row has model, parameters, layout, gpus, scaling, global_batch (sequences), tokens_per_s, tokens_per_s_per_gpu,
efficiency, peak_gib (the fullest rank, reserved) and gpu; seq and micro_batch; cuda_graphs, compile and recompute,
which older rows do not say; and cell, config and overrides, from which its configuration can be loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from hope.fields import NUMBER, POSITIVE, TEXT, each, optional, record
from hope.nesting import json_of
from hope.sections import Problem
from hope.train.written import replace_text
from launch.grid import Cell, Grid, cell_config
from launch.placement import split_overrides

Row = dict[str, Any]
SAME = ("model", "parameters", "overrides", "gpus", "gpu")
"""Two rows that agree in these and in `CHOICES` are of one measurement. The same overrides may mean another model when
defaults have changed."""
ALIKE = ("model", "parameters", "seq", "gpu")
CHOICES = ("cuda_graphs", "compile", "recompute")
"""Of `train`: two rows that differ in one of these, or of which one does not say it, say nothing of each other."""
NEEDED = {
    "model": TEXT,
    "parameters": POSITIVE,
    "layout": TEXT,
    "gpus": POSITIVE,
    "scaling": TEXT,
    "seq": POSITIVE,
    "tokens_per_s": POSITIVE,
    "gpu": TEXT,
    "config": TEXT,
    "overrides": each(TEXT),
}
"""What every row has, of those who read it, and its kinds."""
_SHAPE = record({**NEEDED, "peak_gib": optional(NUMBER)})
WROTE = "a file that `collect --json` wrote"
PLACE = ("run.dir=", "run.name=")
"""Overrides that say nothing of what was measured."""


def row(grid: Grid, cell: Cell, *, tokens_per_s: float, peak_gib: float | None, gpu: str) -> Row:
    """The row of one cell. `efficiency` is None until `with_efficiency`. Raises ConfigError."""
    from launch.estimate import parameters  # brings torch: 2 s that the other commands need not wait for
    from parallel.layout.report import pattern_of

    config = cell_config(grid, cell)
    own, _ = split_overrides(cell.overrides)
    return {
        "model": cell.variant or pattern_of(config.model),
        "parameters": parameters(config),
        "layout": cell.layout,
        "gpus": cell.devices,
        "scaling": cell.scaling,
        "global_batch": config.train.global_batch,
        "micro_batch": config.train.micro_batch,
        "seq": config.train.seq_len,
        **{key: getattr(config.train, key) for key in CHOICES},
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / cell.devices,
        "efficiency": None,
        "peak_gib": peak_gib,
        "gpu": gpu,
        "cell": cell.name,
        "config": grid.config,
        "overrides": [word for word in own if not word.startswith(PLACE)],
    }


def one_gpu(row: Row, rows: Iterable[Row]) -> Row | None:
    """Of `rows` the one of a single GPU that `row` is compared with: same model and length on the same kind of GPU, and
    the same `CHOICES`. Rows without these are compared with one that has none either."""
    alike = lambda r: [r[key] for key in ALIKE] + [r.get(key) for key in CHOICES]
    return next((r for r in rows if r["gpus"] == 1 and alike(r) == alike(row)), None)


def unsaid(row: Row) -> list[str]:
    """Which of `CHOICES` a row does not say."""
    return [key for key in CHOICES if key not in row]


def with_efficiency(rows: Sequence[Row]) -> list[Row]:
    """The rows with `efficiency`: tokens/s per GPU over that of the `one_gpu` among them, None where that is not."""
    found = []
    for row in rows:
        base = one_gpu(row, rows)
        speed = row["tokens_per_s"] / row["gpus"]
        found.append({**row, "efficiency": base and speed / base["tokens_per_s"]})
    return found


def write(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to the list in a file; of one measurement the newest stays. Efficiencies are of what is there then."""
    key = lambda row: json.dumps([row[name] for name in SAME] + [row.get(name) for name in CHOICES])
    old = read(path) if path.exists() else []
    new = {key(row) for row in rows}
    kept = [row for row in old if key(row) not in new]
    text = json.dumps(with_efficiency([*kept, *rows]), indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def read(path: Path) -> list[Row]:
    """All rows of a file. Raises ConfigError: there are none, or one that is no row, by its number from 1."""
    try:
        rows: list[Row] = json_of(path.read_text())
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else f"is no JSON: {error}"
        raise ConfigError(str(path), [Problem("(file)", str(what), WROTE)]) from error
    if wrong := list(_no_rows(rows)):
        raise ConfigError(str(path), wrong)
    return rows


def _no_rows(rows: Any) -> Iterator[Problem]:
    if not isinstance(rows, list):
        yield Problem("(file)", f"is no list of rows but a {type(rows).__name__}", WROTE)
        return
    for number, row in enumerate(rows, 1):
        lacking = [key for key in NEEDED if key not in row] if isinstance(row, dict) else NEEDED
        if lacking:
            yield Problem(f"row {number}", f"lacks {', '.join(lacking)}", WROTE)
        elif wrong := next(_SHAPE("", row), None):
            yield Problem(f"row {number}", str(wrong), WROTE)


def device_of(run: Path) -> str:
    """The kind of device that a run says it had; `cpu`, or the name that CUDA reports. Empty if it does not say."""
    text = run / "env.txt"
    lines = text.read_text().splitlines() if text.exists() else []
    return next((line.removeprefix("device ") for line in lines if line.startswith("device ")), "")
