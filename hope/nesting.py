"""JSON from a file that anyone may have written: nested no deeper than can be read on every Python."""

import json
import sys
from collections.abc import Callable
from typing import Any

DEEPEST = 500
"""Levels of lists and objects in each other. Python's own reader gives up near 1,000, which depends on its caller."""


def json_of(text: str | bytes, decode: Callable[[Any], Any] = json.loads) -> Any:
    """The value in `text`, as `decode` reads it.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested more than DEEPEST levels deep.
    """
    try:
        value = decode(text)
    except RecursionError:
        deep = True
    else:
        opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
        deep = opened > DEEPEST and _deeper_than(DEEPEST, value)
    if deep:
        raise ValueError(f"nested more than {DEEPEST} levels deep, which is the most that is read")
    return value


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float holds too, as those of our logs are."""
    return isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max


def _deeper_than(levels: int, value: Any) -> bool:
    """Level by level, without recursion."""
    inside = [value]
    for _ in range(levels + 1):
        inside = [part for found in inside if isinstance(found, dict | list) for part in _parts(found)]
    return bool(inside)


def _parts(found: dict[str, Any] | list[Any]) -> list[Any]:
    return list(found.values()) if isinstance(found, dict) else found
