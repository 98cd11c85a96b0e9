"""What a file and the words behind it say together: `a.b=c` overrides and further YAML files, the last one winning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.source import one_line, plain, read_yaml
from data_prep.yaml_text import shallow
from hope.sections import Problem

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\[\d+\]|\.[\w-]+)*")


@dataclass
class Given:
    """Everything that was said.

    Attributes:
        values: all of it as one container.
        places: where each key was said last, by dotted path: `line 3`, `line 3 of b.yaml`, `command line: a.b=c`.
        readable: false if a file could not be read at all.
    """

    values: DictConfig
    places: dict[str, str] = field(default_factory=dict)
    readable: bool = True

    def place(self, path: str) -> str:
        """` (line 3)` for a key that was given, else nothing; made to stand behind a message."""
        return f" ({self.places[path]})" if path in self.places else ""


def is_file(word: str) -> bool:
    """Whether a word of the command line means a YAML file: it ends like one, and is no `a.b=c`."""
    key, equals, _ = word.partition("=")
    return word.endswith((".yaml", ".yml")) and not (equals and OVERRIDE.fullmatch(key))


def gather(path: str, words: Sequence[str], texts: set[str], problems: list[Problem]) -> Given:
    """Read the file at `path` and apply the words in order; mistakes go to `problems`.

    A further file is merged over what stands before it: sections key by key, lists as a whole.

    Args:
        texts: paths of plain text keys, which take the words as typed (`run.name=007`).
    """
    values, lines = read_yaml(path, problems)
    given = Given(values, {key: f"line {line}" for key, line in lines.items()}, not _unread(problems))
    for word in words:
        if is_file(word):
            _merge_file(given, word, problems)
        else:
            _override(given, word, texts, problems)
    return given


def _unread(problems: list[Problem]) -> bool:
    return any(problem.path == "(file)" for problem in problems)


def _merge_file(given: Given, path: str, problems: list[Problem]) -> None:
    found: list[Problem] = []
    values, lines = read_yaml(path, found)
    named = lambda p: p if path in p.what else p._replace(what=f"{p.what} (in {path})")
    problems += map(named, found)
    if _unread(found):
        given.readable = False
        return
    try:
        merged = OmegaConf.merge(given.values, values)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # a list over a section, for example
        what = f"{path} cannot be merged: {one_line(error)}"
        problems.append(Problem("(command line)", what, "sections over sections, and lists over lists"))
        return
    assert isinstance(merged, DictConfig)
    given.values = merged
    for key, line in lines.items():
        given.places[key] = f"line {line} of {path}"


def _override(given: Given, override: str, texts: set[str], problems: list[Problem]) -> None:
    key, equals, word = override.partition("=")
    if not equals or not OVERRIDE.fullmatch(key):
        what = f"`{override}` is not of the form section.key=value"
        problems.append(Problem("(command line)", what, _suggest(override)))
        return
    quoted = word[:1] in ("'", '"')
    try:
        value = word if key in texts and not quoted else _yaml_value(word)
        OmegaConf.update(given.values, key, value, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, IndexError, TypeError) as error:
        what = f"cannot read `{override}` of the command line: {one_line(error)}"
        problems.append(Problem(key, what, "quote it"))
        return
    for path in _paths(key, value):
        given.places[path] = f"command line: {override}"


def _paths(key: str, value: Any) -> Iterator[str]:
    """The path of a value, and those of everything in it if it is a mapping."""
    yield key
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _paths(f"{key}.{name}", part)


def _yaml_value(word: str) -> Any:
    """The value YAML reads in the word, interpolations left as they are; nothing is null."""
    return plain(OmegaConf.create({"value": None} if not word else shallow(f"value: {word}")))["value"]


def _suggest(override: str) -> str:
    """What was probably meant by a malformed override."""
    bare = override.lstrip("-+ ")
    key, equals, word = bare.partition("=")
    if equals and OVERRIDE.fullmatch(key.strip()):
        return f"{key.strip()}={word.strip()}"
    return "a key and a value, such as train.steps=100"
