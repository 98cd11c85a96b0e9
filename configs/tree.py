"""Every key of a tree of dataclasses, with its type and the choices that it depends on."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hope.sections import Condition

UNKNOWN = object()
"""Stands for a value that cannot be had. No condition fails because of it."""


class Use(NamedTuple):
    """One condition on a key: another key, and what that one must be."""

    governor: str
    """Path of the other key."""
    values: tuple[Any, ...]
    """As in `hope.sections.Condition`."""
    listed: bool
    """Whether the other key is a list of names, of which values[0] must be one."""

    def holds(self, value: Any) -> bool:
        """Whether it does while the governor has `value`."""
        if value is UNKNOWN:
            return True
        if self.listed:
            return not isinstance(value, list) or self.values[0] in value
        return value in self.values if self.values else bool(value)


class Key(NamedTuple):
    """One key: dotted path, type hint, owning dataclass, its field, and its conditions, outermost section first."""

    path: str
    hint: Any
    owner: type
    field: dataclasses.Field[Any]
    uses: tuple[Use, ...]


def strip_optional(hint: Any) -> Any:
    """`X` of `X | None`; any other hint as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def named_sections(field: dataclasses.Field[Any]) -> Mapping[str, type] | None:
    """{name: dataclass} of a field that holds a section per name; None for any other."""
    make: Callable[[], Mapping[str, type]] | None = field.metadata.get("sections")
    return None if make is None else make()


def leaves(cls: type, section: str = "", uses: tuple[Use, ...] = ()) -> Iterator[Key]:
    """Every key below the dataclass `cls`, in the order of the fields; paths begin with `section`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = _join(section, field.name)
        inner, own = strip_optional(hints[field.name]), uses + _uses(field, section)
        if (sections := named_sections(field)) is not None:
            for name, part in sections.items():
                named = Use(_join(section, field.metadata["named_by"]), (name,), listed=True)
                yield from leaves(part, f"{path}.{name}", (*own, named))
        elif dataclasses.is_dataclass(inner):
            yield from leaves(typing.cast(type, inner), path, own)
        else:
            yield Key(path, hints[field.name], cls, field, own)


def _uses(field: dataclasses.Field[Any], section: str) -> tuple[Use, ...]:
    condition: Condition | None = field.metadata.get("used_if")
    return () if condition is None else (Use(_join(section, condition.key), condition.values, listed=False),)


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def unmet(key: Key, keys: Mapping[str, Key], value: Callable[[str], Any]) -> Use | None:
    """The first condition of a key that does not hold; None if the key is used.

    Args:
        keys: all keys by path.
        value: gives the value at a path, or UNKNOWN.
    """
    for use in key.uses:
        # What an unused key says does not count: without dmgd there is no preconditioner that eps could depend on.
        if unmet(keys[use.governor], keys, value) is None and not use.holds(value(use.governor)):
            return use
    return None
