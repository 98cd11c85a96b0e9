"""What a run's metrics.jsonl says of its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope.nesting import is_number, json_of

Point = tuple[float, float]


class NoCurve(ValueError):
    """A path without losses; the message says what was looked for."""


@dataclass(frozen=True)
class Run:
    """A run's losses by `x`. losses: of training, every logged step. heldout: one list per evaluated key."""

    name: str
    losses: list[Point]
    heldout: dict[str, list[Point]]

    def after(self, first: float) -> Run:
        """Without what is to the left of `first`. Raises NoCurve if nothing is left."""
        kept = lambda line: [point for point in line if point[0] >= first]
        run = Run(self.name, kept(self.losses), {k: line for k, p in self.heldout.items() if (line := kept(p))})
        if not run.losses and not run.heldout:
            last = max(x for line in (self.losses, *self.heldout.values()) for x, _ in line)
            raise NoCurve(f"{self.name} ends at {last:g}, before {first:g}")
        return run


def read_run(path: Path, name: str = "", x: str = "step", only: Sequence[str] = ("heldout_loss",)) -> Run:
    """The run in a folder, or of a metrics.jsonl.

    Args:
        name: in the legend; the folder's name if empty.
        x: the key that counts: step or tokens.
        only: held-out keys, such as heldout_loss.SOURCE of a blend.

    Raises:
        NoCurve: there is no such file, or no loss in it.
    """
    file, records = _file(path), records_of(path)
    losses = points(records, x, "loss")
    heldout = {key: line for key in only if (line := points(records, x, key))}
    if not losses and not heldout:
        keys = sorted({key for record in records for key in record if key.startswith("heldout_loss")})
        known = f"; it has {', '.join(keys)}" if keys else ""
        raise NoCurve(f"{file}: no line has {x} and a loss yet, nor {', '.join(only)}{known}")
    return Run(name or file.resolve().parent.name, losses, heldout)


def _file(path: Path) -> Path:
    return path / "metrics.jsonl" if path.is_dir() else path


def records_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a run folder's metrics.jsonl, or of that file; the last one may be half-written while it goes on.

    Raises:
        NoCurve: there is no such file, or a line before the last is no JSON.
    """
    file = _file(path)
    if not file.is_file():
        raise NoCurve(f"{file}: no such file; give the folder of a run, such as runs/quickstart")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json_of(line))
        except ValueError as error:
            if number < len(lines):
                raise NoCurve(f"{file}: line {number} is no JSON ({error})") from None
    return [record for record in records if isinstance(record, dict)]


def points(records: Sequence[dict[str, Any]], x: str, key: str) -> list[Point]:
    """(x, value of the key) where both are finite numbers: null in the file is a loss that was not."""
    return [(r[x], r[key]) for r in records if is_number(r.get(x)) and is_number(r.get(key))]


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """Exponential mean over about `span` points, without a bias to the first one; 1: as they are.

    weight of a point k points ago: (1 - 2 / (span + 1))^k, divided by the sum of the weights so far.
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result


def thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most about `most` of them, evenly chosen, the last one among them: a picture shows no more."""
    every = max(1, math.ceil(len(points) / most))
    return points if every == 1 else [*points[:-1:every], points[-1]]
