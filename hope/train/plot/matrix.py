"""Held-out losses of a continual run as a matrix: a row for every border of two phases, a column for every source.

Below it the measures of `hope.train.continual` at the last border, by source, and their means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope.nesting import is_number
from hope.train.continual import MEASURES, PREFIX, measures
from hope.train.plot.curves import NoCurve, records_of
from hope.train.plot.picture import Line, Picture, Words

LEFT, TOP, CELL, ROW, GAP = 160, 64, 96, 36, 18
LOW, HIGH = (164, 214, 160), (255, 255, 255)
"""Colours of a column's lowest and highest loss."""


@dataclass(frozen=True)
class Matrix:
    """rows: (phase, losses in nats in the order of `sources`), phase 0 before the first; measures: of the last one."""

    sources: list[str]
    rows: list[tuple[int, list[float]]]
    measures: dict[str, float]


def read_matrix(path: Path) -> Matrix:
    """The matrix in a run folder or a metrics.jsonl, as far as the run has come.

    The row of a border whose evaluation was broken off, and made up for later, is in the events of the folder.

    Raises:
        NoCurve: there is no such file, or no line of a border in it, or its lines are of different sources.
    """
    records = records_of(path)
    events = path / "events.jsonl"
    if path.is_dir() and events.is_file():
        records = [*(e for e in records_of(events) if e.get("event") == "PHASE"), *records]
    rows = {record["phase"]: losses for record in records if (losses := _losses(record))}
    if not rows:
        raise NoCurve(f"{path}: no border of two phases; a matrix is that of a run with train.mode=continual")
    last = max(rows)
    sources = list(rows[last])
    if others := [phase for phase, losses in rows.items() if losses.keys() != rows[last].keys()]:
        raise NoCurve(f"{path}: phase {others[0]} has losses of {', '.join(rows[others[0]])}, phase {last} of others")
    found = measures(sources, [rows.get(phase) for phase in range(last + 1)], rows[last], last - 1)
    return Matrix(sources, [(phase, [rows[phase][name] for name in sources]) for phase in sorted(rows)], found)


def _losses(record: Mapping[str, Any]) -> dict[str, float]:
    """By source; {} if one is no number, or the line is of no border: phases are as many as sources."""
    found = {key.removeprefix(PREFIX): value for key, value in record.items() if key.startswith(PREFIX)}
    phase = record.get("phase")
    border = isinstance(phase, int) and 0 <= phase <= len(found)
    return found if border and all(map(is_number, found.values())) else {}


def matrix_picture(matrix: Matrix, title: str = "") -> Picture:
    """Losses in nats, the darker, the lower within a column, and the measures. A frame: the source of that phase."""
    told = [measure for measure in MEASURES if f"continual.{measure}" in matrix.measures]
    bottom = TOP + ROW * len(matrix.rows) + GAP
    picture = Picture(LEFT + CELL * (len(matrix.sources) + 1) + 20, bottom + ROW * len(told) + 12)
    picture.add(Words(12, 22, title or "held-out loss in nats", size=14))
    for column, name in enumerate([*matrix.sources, *(["mean"] if told else [])]):
        picture.add(Words(LEFT + CELL * (column + 0.5), TOP - 12, name, anchor="middle"))
    for row, (phase, losses) in enumerate(matrix.rows):
        middle = TOP + ROW * (row + 0.5)
        picture.add(Words(LEFT - 10, middle + 4, _label(phase, matrix.sources), anchor="end"))
        for column, loss in enumerate(losses):
            left = LEFT + CELL * column
            seen = [values[column] for _, values in matrix.rows]
            # a thick line is a filled cell
            picture.add(Line([(left, middle), (left + CELL, middle)], _shade(loss, seen), ROW))
            picture.add(Words(left + CELL / 2, middle + 4, f"{loss:.3f}", anchor="middle"))
    for row, (phase, _) in enumerate(matrix.rows):
        if phase >= 1:
            picture.add(_frame(LEFT + CELL * (phase - 1), TOP + ROW * row))
    for row, measure in enumerate(told):
        base = bottom + ROW * (row + 0.5) + 4
        picture.add(Words(LEFT - 10, base, measure.replace("_", " "), anchor="end"))
        for column, value in enumerate(_by_source(matrix, measure)):
            if value is not None:
                picture.add(Words(LEFT + CELL * (column + 0.5), base, f"{value:.3f}", anchor="middle"))
    return picture


def matrix_table(matrix: Matrix) -> list[str]:
    """The same as lines of text."""
    lines = [" " * 20 + "".join(f"{name:>14}" for name in [*matrix.sources, "mean"])]
    for phase, losses in matrix.rows:
        lines.append(f"{_label(phase, matrix.sources):<20}" + "".join(f"{loss:>14.4f}" for loss in losses))
    for measure in MEASURES:
        if f"continual.{measure}" in matrix.measures:
            values = ("" if value is None else f"{value:.4f}" for value in _by_source(matrix, measure))
            lines.append(f"{measure.replace('_', ' '):<20}" + "".join(f"{value:>14}" for value in values))
    return lines


def _by_source(matrix: Matrix, measure: str) -> list[float | None]:
    """Of every source, None where it has none, then the mean."""
    keys = [f"continual.{measure}.{name}" for name in matrix.sources]
    return [matrix.measures.get(key) for key in [*keys, f"continual.{measure}"]]


def _label(phase: int, sources: Sequence[str]) -> str:
    return f"after {sources[phase - 1]}" if phase else "before"


def _shade(loss: float, seen: Sequence[float]) -> str:
    low, high = min(seen), max(seen)
    share = (loss - low) / (high - low) if high > low else 0.0
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(LOW, HIGH, strict=True))


def _frame(left: float, top: float) -> Line:
    right, bottom = left + CELL, top + ROW
    return Line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], "#000000", 1.5)
