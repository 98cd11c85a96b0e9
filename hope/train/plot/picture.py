"""A picture as a list of lines, dots and words, in pixels from the upper left corner, and its SVG."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

_LEAST = 1e-12
"""Between the ends of an axis, as a share of the larger one: marks below it are the same float."""
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")
GREY, PALE = "#57606a", "#d0d7de"


@dataclass(frozen=True)
class Line:
    """Straight pieces between points."""

    points: Sequence[tuple[float, float]]
    colour: str = GREY
    width: float = 1.0
    opacity: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    colour: str
    radius: float = 3.0


@dataclass(frozen=True)
class Words:
    """One line of text that starts, has its middle, or ends at x; y is its base line."""

    x: float
    y: float
    text: str
    colour: str = "#000000"
    anchor: str = "start"
    size: int = 12


@dataclass(frozen=True)
class Picture:
    """Its parts in order; later ones lie over earlier ones."""

    width: int
    height: int
    parts: list[Line | Dot | Words] = field(default_factory=list)

    def add(self, *parts: Line | Dot | Words) -> None:
        """On top of the others."""
        self.parts.extend(parts)

    def svg(self) -> str:
        """An SVG file, on white."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="sans-serif" font-size="12">'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        return "\n".join([head, ground, *map(_svg, self.parts), "</svg>", ""])


def _svg(part: Line | Dot | Words) -> str:
    if isinstance(part, Dot):
        return f'<circle cx="{part.x:.1f}" cy="{part.y:.1f}" r="{part.radius:g}" fill="{part.colour}"/>'
    if isinstance(part, Words):
        anchor = "" if part.anchor == "start" else f' text-anchor="{part.anchor}"'
        size = "" if part.size == 12 else f' font-size="{part.size}"'
        place = f'x="{part.x:.1f}" y="{part.y:.1f}"'
        return f'<text {place} fill="{part.colour}"{anchor}{size}>{escape(part.text)}</text>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in part.points)
    more = f' opacity="{part.opacity:g}"' if part.opacity < 1 else ""
    more += ' stroke-dasharray="4 4"' if part.dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{part.colour}" stroke-width="{part.width:g}"{more}/>'


@dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high`, above `low`, as pixels from `start` to `end`.

    Raises:
        ValueError: they are too close, or too far from each other, to be told apart in floats.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __post_init__(self) -> None:
        if self.logarithmic and self.low <= 0:
            raise ValueError(f"{self.low:g} is on no logarithmic axis")
        if not _LEAST * max(abs(self.low), abs(self.high), _LEAST) < self.high - self.low < math.inf:
            raise ValueError(f"numbers from {self.low:g} to {self.high:g} cannot be told apart on an axis")

    def at(self, value: float) -> float:
        """The pixel of a number."""
        if self.logarithmic:
            low, high, place = (math.log(number) for number in (self.low, self.high, value))
            share = (place - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def marks(self) -> list[float]:
        """Round numbers in it: about six, or 1, 2 and 5 times powers of ten."""
        return powers(self.low, self.high) if self.logarithmic else rounded(self.low, self.high)


def powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive bounds."""
    largest = min(math.ceil(math.log10(high)), sys.float_info.max_10_exp)
    exponents = range(math.floor(math.log10(low)), largest + 1)
    return [m * 10.0**p for p in exponents for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def rounded(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two bounds, four to ten of them."""
    raw = (high - low) / 8
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(number: float) -> str:
    """12000000 as 12M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def bounds(values: Iterable[float], room: float = 0.05) -> tuple[float, float]:
    """Smallest and largest value, with room on both sides; never the same number."""
    found = list(values)
    low, high = min(found), max(found)
    gap = (high - low or abs(high) or 1.0) * room
    return low - gap, high + gap
