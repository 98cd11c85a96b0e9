"""What values of JSON or YAML must be that anyone may have written; the first that is not is told by its place."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hope.nesting import is_number


class Wrong(NamedTuple):
    """A value that cannot be used. place: such as `tests.T40.accuracy`. wanted: in words."""

    place: str
    value: Any
    wanted: str

    def __str__(self) -> str:
        return f"{self.place} is {reprlib.repr(self.value)}, not {self.wanted}"


Kind = Callable[[str, Any], Iterator[Wrong]]
"""(place, value) -> what is wrong in it."""


def inside(place: str, key: object) -> str:
    """The place of what `key` names in `place`, "" being the whole; after a colon the names begin anew."""
    return f"{place}{'' if not place or place.endswith(': ') else '.'}{key}"


def one(fits: Callable[[Any], bool], wanted: str) -> Kind:
    """A single value."""

    def check(place: str, value: Any) -> Iterator[Wrong]:
        if not fits(value):
            yield Wrong(place, value, wanted)

    return check


def optional(kind: Kind) -> Kind:
    """null, or of a kind."""
    return lambda place, value: iter(()) if value is None else kind(place, value)


def each(kind: Kind, least: int = 0) -> Kind:
    """A list of a kind, of `least` or more."""

    def check(place: str, value: Any) -> Iterator[Wrong]:
        if not isinstance(value, list) or len(value) < least:
            yield Wrong(place, value, f"a list of {least} or more" if least else "a list")
            return
        for number, part in enumerate(value):
            yield from kind(inside(place, number), part)

    return check


def by_name(kind: Kind, least: int = 0) -> Kind:
    """A mapping from names to values of a kind, of `least` or more."""

    def check(place: str, value: Any) -> Iterator[Wrong]:
        if not isinstance(value, dict) or len(value) < least or not all(isinstance(key, str) for key in value):
            yield Wrong(place, value, f"a mapping of {least} or more names" if least else "a mapping of names")
            return
        for key, part in value.items():
            yield from kind(inside(place, key), part)

    return check


def record(fields: Mapping[str, Kind]) -> Kind:
    """A mapping whose `fields` have their kinds, as far as they are there. Others are as they like."""

    def check(place: str, value: Any) -> Iterator[Wrong]:
        if not isinstance(value, dict):
            yield Wrong(place, value, "a mapping")
            return
        for key, kind in fields.items():
            if key in value:
                yield from kind(inside(place, key), value[key])

    return check


def _is_real(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool)


TEXT = one(lambda value: isinstance(value, str), "a text")
NUMBER = one(_is_real, "a finite number")
POSITIVE = one(lambda value: _is_real(value) and value > 0, "a finite number above 0")
WHOLE = one(lambda value: _is_real(value) and isinstance(value, int) and value >= 0, "a whole number from 0 on")
