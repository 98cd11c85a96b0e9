"""Fit a plain container to a tree of dataclasses and report every misfit, not just the first.

OmegaConf stops at the first unknown key or wrong type, so each leaf is tried by itself against its field.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.source import plain
from configs.synonyms import ELSEWHERE, SYNONYMS
from configs.tree import leaves, named_sections, strip_optional
from configs.usable import unusable
from hope.arguments import LARGEST
from hope.sections import Problem

BAD = object()
GUESS = "did you mean: "


def defaults(cls: type) -> DictConfig:
    """A structured config of `cls` in which sections without a default are filled in from theirs. Of sections by name
    all are there, also those that nothing names."""
    config: DictConfig = OmegaConf.structured(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if (sections := named_sections(field)) is not None:
            config[field.name] = {name: defaults(section) for name, section in sections.items()}
        elif dataclasses.is_dataclass(hints[field.name]):
            _fill(config, field.name, hints[field.name])
    return config


def _fill(config: DictConfig, name: str, cls: type) -> None:
    """Give a section whose fields all have defaults its values, and the sections by name within it theirs."""
    whole = defaults(cls)
    config[name] = whole if OmegaConf.is_missing(config, name) else OmegaConf.merge(whole, config[name])


def only_named(config: DictConfig, cls: type) -> None:
    """Drop sections by name that nothing names; `config` is one of `cls`, with every value in it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = strip_optional(hints[field.name])
        if named_sections(field) is not None:
            named = list(config[field.metadata["named_by"]])
            config[field.name] = {name: part for name, part in config[field.name].items() if name in named}
        elif dataclasses.is_dataclass(inner) and isinstance(config[field.name], DictConfig):
            only_named(config[field.name], typing.cast(type, inner))


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
    """Walks a container along the fields of `cls`; `problems` collects what does not fit.

    Args:
        place: gives where a path was given, such as " (line 3)", or nothing.
        largest: gives the largest whole number that may stand at a path.
    """

    def __init__(
        self,
        cls: type,
        place: Callable[[str], str] = lambda path: "",
        largest: Callable[[str], int] = lambda _: LARGEST,
    ) -> None:
        self.paths = [key.path for key in leaves(cls)]
        self.sections = {path.rpartition(".")[0] for path in self.paths} - {""}
        self.place, self.largest = place, largest
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
        hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
        sections = {field.name: named_sections(field) for field in fields}

        def fit(part: Any, name: str, child: str) -> Any:
            by_name = sections[name]
            return self.fit(part, hints[name], child) if by_name is None else self._fit_named(part, by_name, child)

        return self._fit_keys(value, list(sections), fit, path)

    def _fit_named(self, value: Any, sections: Mapping[str, type], path: str) -> Any:
        """One section per name."""
        return self._fit_keys(
            value, list(sections), lambda part, name, child: self.fit(part, sections[name], child), path
        )

    def _fit_keys(self, value: Any, names: list[str], fit: Callable[[Any, str, str], Any], path: str) -> Any:
        """The keys of a section that fit; `fit` takes what stands there, the key's name and its path."""
        if not isinstance(value, dict):
            shown = "empty" if value is None else f"{value!r}"
            self._add(path, f"is {shown}, not a section", f"a mapping with keys of: {', '.join(names)}")
            return BAD
        fitted = {}
        for key, part in value.items():
            child = f"{path}.{key}" if path else str(key)
            if key not in names:
                self._add(child, "unknown key", self._nearest(child, str(key), path, names))
                continue
            good = fit(part, key, child)
            if good is not BAD:
                fitted[key] = good
        return fitted

    def _fit_leaf(self, value: Any, hint: Any, path: str) -> Any:
        if strip_optional(hint) is str and isinstance(value, bool | int | float):
            self._add(path, f"YAML reads this text as the {type(value).__name__} {value}", "put it in quotes")
            return BAD
        try:
            read = OmegaConf.merge(OmegaConf.structured(_one_field(hint)), {"value": value})
        except (OmegaConfBaseException, ValueError, TypeError):
            shown = "null" if value is None else repr(value)
            self._add(path, f"{shown} is not {describe(hint)}", _leaf_fix(value, hint))
            return BAD
        if found := unusable(plain(read)["value"], self.largest(path)):
            self._add(path, *found)
            return BAD
        return value

    def _add(self, path: str, what: str, fix: str) -> None:
        self.problems.append(Problem(path, f"{what}{self.place(path)}", fix))

    def _nearest(self, child: str, key: str, section: str, names: list[str]) -> str:
        """What other frameworks call so; near spellings in the section; the same key elsewhere; near paths."""
        if key in SYNONYMS:
            return GUESS + SYNONYMS[key]
        if key in ELSEWHERE:
            return ELSEWHERE[key]
        prefix = f"{section}." if section else ""
        near = [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
        near = near or self._elsewhere(key)
        alike = [path for path in (*self.paths, *self.sections) if _similar(path.rpartition(".")[2], key)]
        near = near or difflib.get_close_matches(child, alike, n=1, cutoff=0.6)
        if near:
            return GUESS + " or ".join(near[:3])
        return f"{section or 'the top level'} has: " + ", ".join(names)

    def _elsewhere(self, key: str) -> list[str]:
        """The same key in other sections, only the least nested."""
        found = [path for path in self.paths if path.rpartition(".")[2] == key]
        return [path for path in found if path.count(".") == min(other.count(".") for other in found)]


def _similar(a: str, b: str) -> bool:
    return difflib.SequenceMatcher(None, a, b).ratio() > 0.5


def _one_field(hint: Any) -> type:
    return dataclasses.make_dataclass("OneField", [("value", hint, MISSING)])


def describe(hint: Any) -> str:
    """A type in words: `a whole number`, `one of cosine, linear`, `a whole number or null`."""
    inner = strip_optional(hint)
    if inner is not hint:
        return f"{describe(inner)} or null"
    if inner == int | float:
        return "a number"
    if typing.get_origin(inner) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(inner)))
    if typing.get_origin(inner) is list:
        return "a list, each item " + describe((typing.get_args(inner) or (Any,))[0])
    if typing.get_origin(inner) is dict:
        return "a mapping, {key: word, ...}"
    if typing.get_origin(inner) in (types.UnionType, typing.Union):
        return " or ".join(map(describe, typing.get_args(inner)))
    words = {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
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
