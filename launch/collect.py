"""A sweep's results: a CSV table, a scaling plot and rows of JSON, from what every run wrote (not from SLURM)."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

from hope.train.written import replace_text
from launch import plot, scaling
from launch.grid import BOTH, Cell, Grid, cell_config, cells
from launch.placement import folder_of
from launch.runs import records, steady
from launch.sweep import devices_of, run_folder, verdict

COLUMNS = ("cell", "nodes", "devices", "layout", "series", "global_batch", "verdict", "step", "tokens_per_s",
           "tokens_per_s_per_device", "mfu", "efficiency", "memory_gb", "loss", "heldout_loss", "starts")  # fmt: skip


def collect(grid: Grid, out: str | None, json: Path | None = None, devices: int | None = None) -> int:
    """Write results.csv and scaling.svg to `out`, print the table; 0 if every cell has a speed.

    json: file that gets a row for every cell with a speed too, see `launch.scaling`. devices: see `sweep.devices_of`.
    """
    chosen = cells(grid, devices_of(grid, devices))
    rows = add_efficiency([row(grid, cell) for cell in chosen])
    folder = Path(out) if out else run_folder(grid, chosen[0]).root.parent
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "results.csv", results_csv(rows))
    print(results_csv(rows), end="")
    timed = [r for r in rows if r["tokens_per_s"] is not None]
    if timed:
        replace_text(folder / "scaling.svg", plot.scaling(timed, f"{grid.name}, {grid.scaling} scaling"))
        print(f"{folder / 'results.csv'}  {folder / 'scaling.svg'}")
    if json:
        scaling.write(json, [scale_row(grid, cell, r) for cell, r in zip(chosen, rows, strict=True) if r in timed])
    return 0 if len(timed) == len(rows) else 1


def row(grid: Grid, cell: Cell) -> dict[str, Any]:
    """One cell; a cell that never ran has None for what was not measured."""
    config = cell_config(grid, cell)
    folder = folder_of(config)
    timed, everything = steady(folder.root), records(folder.root)

    def median(key: str) -> float | None:
        return statistics.median(r[key] for r in timed) if timed and timed[-1].get(key) is not None else None

    def last(key: str) -> float | None:
        return next((r[key] for r in reversed(everything) if r.get(key) is not None), None)

    speed, each = median("tokens_per_s"), median("tokens_per_s_per_device")
    return {
        "cell": cell.name,
        "nodes": cell.nodes,
        "devices": None if speed is None or each is None else round(speed / each),
        "layout": cell.layout,
        "series": f"{cell.series} {cell.scaling}" if grid.scaling == BOTH else cell.series,
        "base": cell.series,
        "global_batch": config.train.global_batch,
        "verdict": verdict(folder) or "none",
        "step": last("step"),
        "tokens_per_s": speed,
        "tokens_per_s_per_device": each,
        "mfu": median("mfu"),
        "efficiency": None,
        "memory_gb": last("memory_gb"),
        "loss": last("loss"),
        "heldout_loss": last("heldout_loss"),
        "starts": len([r for r in records(folder.control, "verdicts.jsonl") if "attempt" in r]),
    }


def add_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`efficiency`: tokens/s per device over that of the cell of the same series with the fewest devices."""
    timed = sorted((r for r in rows if r["devices"]), key=lambda r: r["devices"])
    for r in timed:
        base = next(other for other in timed if other["base"] == r["base"])
        r["efficiency"] = r["tokens_per_s_per_device"] / base["tokens_per_s_per_device"]
    return rows


def scale_row(grid: Grid, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """The row of `launch.scaling` of a cell whose row of the table is `found`."""
    return scaling.row(
        grid,
        cell,
        tokens_per_s=found["tokens_per_s"],
        peak_gib=found["memory_gb"],
        gpu=scaling.device_of(run_folder(grid, cell).root),
    )


def results_csv(rows: list[dict[str, Any]]) -> str:
    """CSV with a header; numbers with six digits, nothing for what is unknown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in rows:
        writer.writerow(["" if r[key] is None else _cell(r[key]) for key in COLUMNS])
    return text.getvalue()


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
