"""What every section of the configuration is made of: problems with a path, and keys that only some choices use."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong in a configuration."""

    path: str
    """YAML path, such as `model.heads`."""
    what: str
    """What is wrong, with the numbers."""
    fix: str
    """What would work; may be empty."""


class MixerSection:
    """Base of the section that a mixer owns, `model.mixers.NAME`: a dataclass whose fields all have defaults."""

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        """Everything that cannot work, given the width of a head."""
        return iter(())

    def problems_of_heads(self, path: str, heads: int) -> Iterator[Problem]:
        """Everything that cannot work, given how many heads the model has."""
        return iter(())

    def divided(self) -> Iterator[tuple[str, int]]:
        """(key, what its value is over tensor-parallel ranks must be whole) of what they divide besides heads."""
        return iter(())

    def kinds(self) -> "Mapping[str, MixerSection]":
        """Sections of published layers that this mixer can be, by name; {}: it is one. `python -m hope.mixers` lists
        them."""
        return {}

    def paper(self) -> str:
        """Where the layer is from, in a few words; by default the first sentence of the section's docstring."""
        return " ".join((self.__doc__ or "").split("\n\n")[0].split())

    def endless(self) -> tuple[str, str] | None:
        """(key, value that would end that) if the state grows with every token, so that no stream can be followed."""
        return None

    def hazards(self) -> list[str]:
        """Settings that were seen to diverge, as sentences for a warning."""
        return []


class Condition(NamedTuple):
    """When a field is used, in its metadata under `used_if`."""

    key: str
    """Another field of the same section, or `section.key` below it."""
    values: tuple[Any, ...]
    """What that field must be, one of these. Empty: anything but false, 0, null and what is empty."""


def only_if(key: str, *values: Any, default: Any = None, factory: Callable[[], Any] | None = None) -> Any:
    """A dataclass field that is used only while `key` has one of `values`, or without them, while it is set at all.

    A condition on a key that is itself not used does not count. Whoever gives an unused key is told so: a key that does
    nothing makes a sweep compare equal runs.
    """
    metadata = {"used_if": Condition(key, values)}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


def sections_named_by(key: str, sections: Callable[[], Mapping[str, type]]) -> Any:
    """A dataclass field {name: section} that holds a section for every name in the list `key` of the same section.

    Args:
        sections: gives the dataclass of every name that there is. Asked anew each time, since names can be added.
    """
    return field(default_factory=dict, metadata={"named_by": key, "sections": sections})
