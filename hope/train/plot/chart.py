"""Losses of runs on two axes: training as a line, smoothed over a pale one, held out as dots joined by dashes."""

from __future__ import annotations

from collections.abc import Sequence

from hope.train.plot.curves import Point, Run, smoothed, thinned
from hope.train.plot.picture import COLOURS, GREY, PALE, Axis, Dot, Line, Picture, Words, bounds, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 64, 210, 40, 50
MOST_POINTS = 1500
"""Of one line: about two per pixel."""


def chart(runs: Sequence[Run], span: int, x_name: str = "step", logarithmic: bool = False, title: str = "") -> Picture:
    """A picture of the losses in nats.

    Args:
        span: records that the lines are smoothed over.
        logarithmic: the horizontal axis; points at 0 are left out.

    Raises:
        NoCurve: a run has no others.
    """
    shown = [run.after(5e-324) for run in runs] if logarithmic else runs
    smooth = [smoothed(run.losses, span) for run in shown]
    seen = [*(p for line in smooth for p in line), *(p for run in shown for line in run.heldout.values() for p in line)]
    low, high = min(p[0] for p in seen), max(p[0] for p in seen)
    across = Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT, logarithmic)
    up = Axis(*bounds(p[1] for p in seen), HEIGHT - BOTTOM, TOP)
    picture = Picture(WIDTH, HEIGHT)
    _frame(picture, across, up, x_name, title)
    for number, (run, line) in enumerate(zip(shown, smooth, strict=True)):
        _draw(picture, run, line, COLOURS[number % len(COLOURS)], across, up, span)
    rows = [label for run in runs for label in _labels(run)]
    order = [COLOURS[number % len(COLOURS)] for number, run in enumerate(runs) for _ in _labels(run)]
    for row, (label, colour) in enumerate(zip(rows, order, strict=True)):
        picture.add(Words(WIDTH - RIGHT + 14, TOP + 12 + 18 * row, label, colour))
    return picture


def _frame(picture: Picture, across: Axis, up: Axis, x_name: str, title: str) -> None:
    picture.add(Words(LEFT, 22, title or "loss in nats", size=14))
    for mark in up.marks():
        picture.add(Line([(LEFT, up.at(mark)), (WIDTH - RIGHT, up.at(mark))], PALE))
        picture.add(Words(LEFT - 8, up.at(mark) + 4, f"{mark:.4g}", anchor="end"))
    for mark in across.marks():
        picture.add(Words(across.at(mark), HEIGHT - BOTTOM + 18, short(mark), anchor="middle"))
    picture.add(Line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], GREY))
    picture.add(Words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"))


def _draw(picture: Picture, run: Run, line: Sequence[Point], colour: str, across: Axis, up: Axis, span: int) -> None:
    place = lambda points: [(across.at(x), min(max(up.at(y), TOP), HEIGHT - BOTTOM)) for x, y in points]
    if span > 1 and run.losses:
        picture.add(Line(place(thinned(run.losses, MOST_POINTS)), colour, 1.0, 0.25))
    if line:
        picture.add(Line(place(thinned(line, MOST_POINTS)), colour, 1.8))
    for points in run.heldout.values():
        where = place(thinned(points, MOST_POINTS))
        picture.add(Line(where, colour, 1.0, dashed=True), *(Dot(x, y, colour) for x, y in where))


def _labels(run: Run) -> list[str]:
    """One row for training and one for every held-out set, with the last value."""
    rows = [f"{run.name}  loss"] if run.losses else []
    return rows + [f"{run.name}  {key} {line[-1][1]:.4f}" for key, line in run.heldout.items()]
