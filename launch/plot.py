"""The scaling plot as SVG: tokens/s over devices on two logarithmic axes, the ideal line, efficiency at every point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hope.train.plot.picture import COLOURS, GREY, PALE, Axis, Dot, Line, Picture, Words

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 76, 150, 40, 50


def scaling(rows: Sequence[dict[str, Any]], title: str) -> str:
    """One line per series, which is a layout with values of the grid; a row has devices, tokens_per_s, efficiency."""
    names = list(dict.fromkeys(r["series"] for r in rows))
    series = [sorted((r for r in rows if r["series"] == name), key=lambda r: r["devices"]) for name in names]
    across, up = _axes(series)
    picture = Picture(WIDTH, HEIGHT)
    picture.add(
        Words(LEFT, 22, title, size=14),
        Line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], GREY),
        Words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "devices", anchor="middle"),
    )
    for n in sorted({r["devices"] for r in rows}):
        picture.add(Words(across.at(n), HEIGHT - BOTTOM + 18, str(n), anchor="middle"))
    for level in up.marks():
        picture.add(Line([(LEFT, up.at(level)), (WIDTH - RIGHT, up.at(level))], PALE))
        picture.add(Words(LEFT - 8, up.at(level) + 4, f"{level:g} tok/s", anchor="end"))
    for index, name in enumerate(names):
        _series(picture, series[index], name, index, across, up)
    return picture.svg()


def _axes(series: Sequence[Sequence[dict[str, Any]]]) -> tuple[Axis, Axis]:
    """Room for every point and for the ideal line of every series, whose rows are ordered by devices."""
    devices = [row["devices"] for rows in series for row in rows]
    speeds = [row["tokens_per_s"] for rows in series for row in rows]
    low, high = min(devices), max(max(devices), 2 * min(devices))
    top = max(*speeds, *(_ideal(rows, high) for rows in series)) * 1.3
    across = Axis(low, high, LEFT, WIDTH - RIGHT, logarithmic=True)
    return across, Axis(min(speeds) / 1.3, top, HEIGHT - BOTTOM, TOP, logarithmic=True)


def _series(picture: Picture, rows: list[dict[str, Any]], name: str, index: int, across: Axis, up: Axis) -> None:
    colour, first = COLOURS[index % len(COLOURS)], rows[0]
    start = across.at(first["devices"]), up.at(first["tokens_per_s"])
    end = across.at(across.high), up.at(_ideal(rows, int(across.high)))
    points = [(across.at(r["devices"]), up.at(r["tokens_per_s"])) for r in rows]
    picture.add(
        Line([start, end], colour, opacity=0.5, dashed=True),
        Line(points, colour, 2.0),
        Words(WIDTH - RIGHT + 16, TOP + 14 + 22 * index, f"{name} (dashed: ideal)", colour),
    )
    for (x, y), row in zip(points, rows, strict=True):
        picture.add(Dot(x, y, colour, 4.0), Words(x + 7, y + 15, f"{row['efficiency']:.0%}", colour))


def _ideal(rows: Sequence[dict[str, Any]], devices: int) -> float:
    """Tokens/s on so many devices if a series, ordered by devices, grew with them from its first point on."""
    speed: float = rows[0]["tokens_per_s"]
    return speed * devices / rows[0]["devices"]
