"""Which keys of a configuration are used: the others are refused when given, and left out when a run is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from configs.tree import UNKNOWN, Use, leaves, unmet
from hope.sections import Problem


def unused_given(
    cls: type, given: Mapping[str, Any], value: Callable[[str], Any], place: Callable[[str], str]
) -> Iterator[Problem]:
    """A problem for every key in the nested container `given` that the chosen kinds do not use.

    Args:
        value: gives the value at a path after defaults, or UNKNOWN.
        place: gives where a key was given, such as " (line 3)".
    """
    keys = {key.path: key for key in leaves(cls)}
    for path, key in keys.items():
        if lookup(given, path) is not UNKNOWN and (use := unmet(key, keys, value)) is not None:
            what, fix = explain(use, value(use.governor))
            yield Problem(path, f"{what}{place(path)}", fix)


def explain(use: Use, value: Any) -> tuple[str, str]:
    """(why a key is not used while the governor has `value`, what would change that)."""
    if use.listed:
        what = f"is not used: no layer of {use.governor} is {use.values[0]}"
        return what, f"leave it out, or name {use.values[0]} in {use.governor}"
    other = " or ".join(f"{use.governor}={word(wanted)}" for wanted in use.values) or f"set {use.governor}"
    return f"is not used: {use.governor} is {word(value)}", f"leave it out, or {other}"


def word(value: Any) -> str:
    """A value as YAML and the command line write it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if isinstance(value, bool | str | None) and value in words else str(value)


def recorded(config: Any) -> dict[str, Any]:
    """The values of all used keys of a configuration as nested plain containers: what runs and checkpoints record."""
    keys = {key.path: key for key in leaves(type(config))}
    result: dict[str, Any] = {}
    for path, key in keys.items():
        if unmet(key, keys, lambda other: _attribute(config, other)) is None:
            put(result, path, _plain(_attribute(config, path)))
    return result


def without_unused(record: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A recorded configuration without the keys of `cls` that its own choices do not use; unknown keys stay."""
    keys = {key.path: key for key in leaves(cls)}
    unused = [path for path, key in keys.items() if unmet(key, keys, lambda other: lookup(record, other)) is not None]
    return _without(record, unused)


def lookup(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of nested containers, or UNKNOWN."""
    found: Any = values
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return UNKNOWN
        found = found[part]
    return found


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; sections on the way are made."""
    *sections, last = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _without(values: Mapping[str, Any], paths: list[str], prefix: str = "") -> dict[str, Any]:
    """Without these paths, and without sections that nothing is left of."""
    result = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path in paths:
            continue
        if isinstance(value, Mapping) and any(other.startswith(f"{path}.") for other in paths):
            if part := _without(value, paths, f"{path}."):
                result[name] = part
        else:
            result[name] = value
    return result


def _attribute(config: Any, path: str) -> Any:
    found = config
    for part in path.split("."):
        found = found[part] if isinstance(found, Mapping) else getattr(found, part)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
