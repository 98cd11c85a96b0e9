"""Rows of benchmarks/probes.py as a picture: `python benchmarks/probes_picture.py ROWS OUT.svg`.

A panel per probe: accuracy over the tests in their order, a line per model at its best rate, the mean of its seeds.
Of needle, which no small model answers, the nats per token of the answer over lengths, the mean of all kinds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept import keep_picture, rows_of
from probes import NEEDLE, best_rows
from recipe import Row
from recipe_picture import NAMES

from hope.pipe import piped
from hope.train.plot.picture import COLOURS, PALE, Axis, Dot, Line, Picture, Words

WIDE, HIGH, GAP, TOP, BOTTOM, LEFT = 270, 210, 50, 34, 84, 40


class Panel(NamedTuple):
    """One probe: the names of its tests, the values of every model in their order, and the largest that is shown."""

    title: str
    tests: list[str]
    models: dict[str, list[float]]
    high: float


def panels(rows: list[Row]) -> list[Panel]:
    """In the order in which the probes were run first."""
    chosen, found = best_rows(rows), []
    for probe in dict.fromkeys(row["probe"] for row in rows):
        models = {model: same for (name, model), same in chosen.items() if name == probe}
        values = {model: _values(same, probe) for model, same in models.items()}
        tests = list(next(iter(values.values())))
        lists = {model: [by_test[test] for test in tests] for model, by_test in values.items()}
        high = 100.0 if probe != NEEDLE else max(max(values) for values in lists.values()) * 1.05
        found.append(Panel(f"{probe}, {'%' if probe != NEEDLE else 'nats per token'}", tests, lists, high))
    return found


def _values(rows: list[Row], probe: str) -> dict[str, float]:
    """By test, or of needle by length: the mean over seeds (and kinds)."""
    if probe != NEEDLE:
        return {
            test: 100 * statistics.mean(row["tests"][test]["accuracy"]["value"] for row in rows)
            for test in rows[0]["tests"]
        }
    by_length: dict[str, list[float]] = {}
    for row in rows:
        for test, result in row["tests"].items():
            by_length.setdefault(test.partition(".")[2], []).append(result["nats_per_token"]["value"])
    return {length: statistics.mean(values) for length, values in by_length.items()}


def draw(found: list[Panel]) -> Picture:
    """Panels side by side, names below. Raises ValueError: there is nothing."""
    if not found:
        raise ValueError("there are no rows")
    names = list(dict.fromkeys(model for panel in found for model in panel.models))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    picture = Picture(LEFT + len(found) * (WIDE + GAP), TOP + HIGH + BOTTOM)
    for number, panel in enumerate(found):
        _panel(picture, panel, LEFT + number * (WIDE + GAP), colours)
    for number, name in enumerate(names):
        x, y = LEFT + 10 + (number % 3) * 220, TOP + HIGH + 56 + (number // 3) * 20
        picture.add(Dot(x - 8, y - 4, colours[name], 4), Words(x, y, NAMES.get(name, name)))
    return picture


def _panel(picture: Picture, panel: Panel, left: float, colours: dict[str, str]) -> None:
    across = Axis(-0.3, len(panel.tests) - 0.7, left, left + WIDE)
    up = Axis(0.0, panel.high, TOP + HIGH, TOP)
    picture.add(Words(left, TOP - 14, panel.title))
    for mark in up.marks():
        y = up.at(mark)
        picture.add(
            Line([(left, y), (left + WIDE, y)], PALE), Words(left - 6, y + 4, f"{mark:g}", anchor="end", size=10)
        )
    for place, test in enumerate(panel.tests):
        x = across.at(place)
        for line, part in enumerate(test.split(".")):
            picture.add(Words(x, TOP + HIGH + 16 + 13 * line, part, anchor="middle", size=10))
    for model, values in panel.models.items():
        points = [(across.at(place), up.at(value)) for place, value in enumerate(values)]
        picture.add(Line(points, colours[model], 2), *(Dot(x, y, colours[model]) for x, y in points))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", nargs="+", default=[], metavar="PROBE", help="probes to leave out")
    args = parser.parse_args(argv)
    rows = [row for row in rows_of(args.rows) if row["probe"] not in args.without]
    keep_picture(args.out, args.rows, lambda: draw(panels(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
