"""What every section of the configuration is made of: problems with a path, and keys that only some choices use."""

from collections.abc import Callable, Iterator
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

    def hazards(self) -> list[str]:
        """Settings that were seen to diverge, as sentences for a warning."""
        return []


def only_if(key: str, *values: Any, default: Any = None, factory: Callable[[], Any] | None = None) -> Any:
    """A dataclass field that is used only while the field `key` of the same section has one of `values`.

    Whoever sets it otherwise is told so: a key that does nothing makes a sweep compare equal runs.
    """
    metadata = {"used_if": (key, values)}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)
