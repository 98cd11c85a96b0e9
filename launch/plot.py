"""The scaling plot as SVG: tokens/s over devices on two logarithmic axes, the ideal line, efficiency at every point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 76, 150, 40, 50
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")


@dataclass(frozen=True)
class _Axes:
    """Both axes are logarithmic: devices from `low` to `high`, tokens/s from `bottom` to `top`."""

    low: int
    high: int
    bottom: float
    top: float

    @classmethod
    def of(cls, series: Sequence[Sequence[dict[str, Any]]]) -> _Axes:
        """Room for every point and for the ideal line of every series, whose rows are ordered by devices."""
        devices = [row["devices"] for rows in series for row in rows]
        speeds = [row["tokens_per_s"] for rows in series for row in rows]
        low, high = min(devices), max(max(devices), 2 * min(devices))
        return cls(low, high, min(speeds) / 1.3, max(*speeds, *(_ideal(rows, high) for rows in series)) * 1.3)

    def x(self, devices: float) -> float:
        """Pixels from the left edge."""
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(devices / self.low) / math.log(self.high / self.low)

    def y(self, speed: float) -> float:
        """Pixels from the upper edge."""
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(self.top / speed) / math.log(self.top / self.bottom)


def scaling(rows: Sequence[dict[str, Any]], title: str) -> str:
    """One line per series, which is a layout with values of the grid; a row has devices, tokens_per_s, efficiency."""
    names = list(dict.fromkeys(r["series"] for r in rows))
    series = [sorted((r for r in rows if r["series"] == name), key=lambda r: r["devices"]) for name in names]
    axes = _Axes.of(series)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#57606a"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">devices</text>',
    ]
    for n in sorted({r["devices"] for r in rows}):
        parts.append(f'<text x="{axes.x(n):.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{n}</text>')
    for level in _levels(axes.bottom, axes.top):
        parts.append(f'<path d="M{LEFT} {axes.y(level):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{axes.y(level) + 4:.1f}" text-anchor="end">{level:g} tok/s</text>')
    for index, name in enumerate(names):
        parts += _series(series[index], name, index, axes)
    return "\n".join([*parts, "</svg>", ""])


def _series(rows: list[dict[str, Any]], name: str, index: int, axes: _Axes) -> list[str]:
    colour, first = COLOURS[index % len(COLOURS)], rows[0]
    x, y, high = axes.x, axes.y, axes.high
    ideal = _ideal(rows, high)
    points = " ".join(f"{x(r['devices']):.1f},{y(r['tokens_per_s']):.1f}" for r in rows)
    legend = WIDTH - RIGHT + 16, TOP + 14 + 22 * index
    parts = [
        f'<path d="M{x(first["devices"]):.1f} {y(first["tokens_per_s"]):.1f}L{x(high):.1f} {y(ideal):.1f}" '
        f'stroke="{colour}" stroke-dasharray="4 4" opacity="0.5"/>',
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<text x="{legend[0]}" y="{legend[1]}" fill="{colour}">{escape(name)} (dashed: ideal)</text>',
    ]
    for r in rows:
        parts.append(f'<circle cx="{x(r["devices"]):.1f}" cy="{y(r["tokens_per_s"]):.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x(r["devices"]) + 7:.1f}" y="{y(r["tokens_per_s"]) + 15:.1f}" fill="{colour}">'
                     f'{r["efficiency"]:.0%}</text>')  # fmt: skip
    return parts


def _ideal(rows: Sequence[dict[str, Any]], devices: int) -> float:
    """Tokens/s on so many devices if a series, ordered by devices, grew with them from its first point on."""
    speed: float = rows[0]["tokens_per_s"]
    return speed * devices / rows[0]["devices"]


def _levels(bottom: float, top: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two bounds."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if bottom <= m * 10.0**p <= top]
