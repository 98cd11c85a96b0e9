"""Fit a plain container to a tree of dataclasses and report every misfit, not just the first.

OmegaConf stops at the first unknown key or wrong type, so each leaf is tried by itself against its field.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hope.sections import Problem

BAD = object()
GUESS = "did you mean: "


def strip_optional(hint: Any) -> Any:
    """`X` of `X | None`; any other hint as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, type, dataclasses.Field]]:
    """(dotted path, type hint, owning dataclass, field) of every key, in the order of the fields."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = strip_optional(hints[field.name])
        if dataclasses.is_dataclass(inner):
            yield from leaves(typing.cast(type, inner), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], cls, field


def defaults(cls: type) -> DictConfig:
    """A structured config of `cls` in which sections without a default are filled in from theirs."""
    config = OmegaConf.structured(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]) and OmegaConf.is_missing(config, field.name):
            config[field.name] = defaults(hints[field.name])
    return config


def missing_paths(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the required values (`???`) in a container whose interpolations need not resolve."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from missing_paths(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from missing_paths(part, f"{path}[{index}]")
    elif value == MISSING:
        yield path


class Fitter:
    """Walks a container along the fields of `cls`; `problems` collects what does not fit."""

    def __init__(self, cls: type, lines: dict[str, int], given: dict[str, str]):
        self.paths = [path for path, *_ in leaves(cls)]
        self.sections = {path.rpartition(".")[0] for path in self.paths} - {""}
        self.lines, self.given = lines, given
        self.problems: list[Problem] = []

    def fit(self, value: Any, hint: Any, path: str) -> Any:
        """The part of `value` that fits `hint`, or BAD."""
        inner = strip_optional(hint)
        if isinstance(value, str) and value == MISSING:
            return value  # "???": reported with the missing values
        if dataclasses.is_dataclass(inner):
            return value if value is None and inner is not hint else self._fit_section(value, inner, path)
        if typing.get_origin(inner) is list and isinstance(value, list):
            (item,) = typing.get_args(inner) or (Any,)
            return self._all([self.fit(part, item, f"{path}[{i}]") for i, part in enumerate(value)])
        return self._fit_leaf(value, hint, path)

    def _all(self, parts: list[Any]) -> Any:
        return BAD if any(part is BAD for part in parts) else parts

    def _fit_section(self, value: Any, cls: Any, path: str) -> Any:
        if not isinstance(value, dict):
            shown = "empty" if value is None else f"{value!r}"
            keys = ", ".join(field.name for field in dataclasses.fields(cls))
            self._add(path, f"is {shown}, not a section", f"a mapping with keys of: {keys}")
            return BAD
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        fitted = {}
        for key, part in value.items():
            child = f"{path}.{key}" if path else str(key)
            if key not in names:
                self._add(child, "unknown key", self._nearest(child, str(key), path, names))
                continue
            good = self.fit(part, hints[key], child)
            if good is not BAD:
                fitted[key] = good
        return fitted

    def _fit_leaf(self, value: Any, hint: Any, path: str) -> Any:
        if strip_optional(hint) is str and isinstance(value, bool | int | float):
            self._add(path, f"YAML reads this text as the {type(value).__name__} {value}", "put it in quotes")
            return BAD
        try:
            OmegaConf.merge(OmegaConf.structured(_one_field(hint)), {"value": value})
        except (OmegaConfBaseException, ValueError, TypeError):
            shown = "null" if value is None else repr(value)
            self._add(path, f"{shown} is not {describe(hint)}", _leaf_fix(value, hint))
            return BAD
        return value

    def _add(self, path: str, what: str, fix: str) -> None:
        if path in self.given:
            what += f" (command line: {self.given[path]})"
        elif path in self.lines:
            what += f" (line {self.lines[path]})"
        self.problems.append(Problem(path, what, fix))

    def _nearest(self, child: str, key: str, section: str, names: list[str]) -> str:
        """Near spellings in the section first, then the same key elsewhere, then near paths."""
        prefix = f"{section}." if section else ""
        near = [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
        near = near or [path for path in self.paths if path.rpartition(".")[2] == key]
        near = near or difflib.get_close_matches(child, [*self.paths, *self.sections], n=1, cutoff=0.6)
        if near:
            return GUESS + " or ".join(near[:3])
        return f"{section or 'the top level'} has: " + ", ".join(names)


def _one_field(hint: Any) -> type:
    return dataclasses.make_dataclass("OneField", [("value", hint, MISSING)])


def describe(hint: Any) -> str:
    """A type in words: `a whole number`, `one of cosine, linear`, `a whole number or null`."""
    inner = strip_optional(hint)
    if inner is not hint:
        return f"{describe(inner)} or null"
    if typing.get_origin(inner) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(inner)))
    if typing.get_origin(inner) is list:
        return "a list, each item " + describe((typing.get_args(inner) or (Any,))[0])
    if typing.get_origin(inner) is dict:
        return "a mapping, {key: word, ...}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(inner, str(inner).replace("typing.", ""))


def _leaf_fix(value: Any, hint: Any) -> str:
    inner = strip_optional(hint)
    if inner is int and isinstance(value, float) and math.isfinite(value):
        low, high = math.floor(value), math.ceil(value)
        return str(low) if low == high else f"nearest: {low}, {high}"
    if typing.get_origin(inner) is typing.Literal:
        near = difflib.get_close_matches(str(value), [str(arm) for arm in typing.get_args(inner)], n=1)
        return f"{GUESS}{near[0]}" if near else ""
    return {int: "100", float: "0.1 or 3e-4", bool: "true or false"}.get(inner, "")
