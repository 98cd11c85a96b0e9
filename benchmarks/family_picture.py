"""The picture of benchmarks/family.py: held-out loss against bytes of state (left) and tokens/s (right), best above.

A model has one name, in the middle, and a line to its dot on either side. Where nothing was measured there is no dot.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_picture import NAMES

from hope.train.plot.picture import COLOURS, PALE, Axis, Dot, Line, Picture, Words, bounds, short

WIDTH, TOP, BOTTOM, ROW = 860, 24, 52, 17
LEFT, RIGHT = (60.0, 310.0), (540.0, 820.0)
"""From where to where the two fields go, in pixels."""
FIELDS = (("state_bytes", "bytes of state", LEFT), ("tokens_per_s", "tokens/s", RIGHT))


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the ascending wanted ones, at least `gap` apart, between `low` and `high` if there is room."""
    places: list[float] = []
    for number, place in enumerate(wanted):
        latest = high - gap * (len(wanted) - 1 - number)  # so that the rest still fits
        places.append(max(min(place, latest), places[-1] + gap if places else low))
    return places


def draw(rows: list[dict[str, Any]]) -> Picture:
    """Raises ValueError: no model has a loss."""
    rows = sorted((row for row in rows if row["heldout"] is not None), key=lambda row: row["heldout"])
    if not rows:
        raise ValueError("no model has a held-out loss: there is nothing to draw")
    height = TOP + max(16, len(rows)) * ROW + BOTTOM
    picture, bottom = Picture(WIDTH, height), height - BOTTOM
    low, high = bounds((row["heldout"] for row in rows), 0.08)
    loss = Axis(low, high, TOP, bottom)
    for mark in loss.marks():
        y = loss.at(mark)
        picture.add(*(Line([(start, y), (end, y)], PALE) for *_, (start, end) in FIELDS))
        picture.add(Words(LEFT[0] - 6, y + 4, f"{mark:g}", anchor="end"))
    picture.add(Words(LEFT[0] - 46, TOP - 10, "held-out loss in nats, less is better"))
    heights = [loss.at(row["heldout"]) for row in rows]
    names = spread(heights, ROW - 2, TOP + 8, bottom - 4)
    colours = [COLOURS[0] if row["model"].startswith("hope") else COLOURS[1] for row in rows]
    for row, place, colour in zip(rows, names, colours, strict=True):
        text = NAMES.get(row["model"], row["model"])
        picture.add(Words((LEFT[1] + RIGHT[0]) / 2, place + 4, text, colour, "middle"))
    for key, title, (start, end) in FIELDS:
        known = [number for number, row in enumerate(rows) if row[key]]
        picture.add(Words((start + end) / 2, height - 8, title, anchor="middle"))
        if not known:
            continue
        axis = Axis(*reach([rows[number][key] for number in known]), start, end, logarithmic=True)
        for mark in axis.marks():
            x = axis.at(mark)
            picture.add(Line([(x, TOP), (x, bottom)], PALE), Words(x, bottom + 16, short(mark), anchor="middle"))
        edge = LEFT[1] + 8 if start == LEFT[0] else RIGHT[0] - 8
        for number in known:
            x, y = axis.at(rows[number][key]), heights[number]
            picture.add(Line([(edge, names[number]), (x, y)], colours[number], 0.6, 0.5))
            picture.add(Dot(x, y, colours[number], 4))
    return picture


def reach(values: list[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with room."""
    return min(values) / 1.3, max(values) * 1.3
