"""Reading what a run has written, from outside."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hope.nesting import is_number, json_of

SHOWN = ("tokens", "loss", "heldout_loss", "grad_norm", "lr", "tokens_per_s", "tokens_per_s_per_device", "mfu",
         "memory_gb", "step_time_s", "data_time_s", "eta_s")  # fmt: skip
"""Keys of metrics.jsonl whose values are numbers."""


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file of a run folder; [] without one. What is no record of ours is passed over."""
    found = []
    try:
        lines = (folder / name).read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json_of(line))
        except ValueError:  # the last line, being written
            continue
    return [record for record in found if isinstance(record, dict) and _is_ours(record)]


def _is_ours(record: dict[str, Any]) -> bool:
    """Whether what is counted and shown of it are numbers; null is one that was not finite, or not measured. A verdict
    has step -1 where there was no checkpoint."""
    counted = isinstance(record.get("step", 0), int) and record.get("step", 0) >= -1
    return counted and all(record.get(key) is None or is_number(record[key]) for key in SHOWN)


def steady(folder: Path) -> list[dict[str, Any]]:
    """Records of steps without the first of every process, which compile and warm up: the last three quarters."""
    timed = [r for r in records(folder) if r.get("step_time_s")]
    return timed[len(timed) // 4 :] if len(timed) > 3 else timed[1:] or timed


def measured_step_s(folder: Path) -> float | None:
    """Median seconds of a step of this run so far; None if it never made one."""
    times = [r["step_time_s"] for r in steady(folder)]
    return statistics.median(times) if times else None
