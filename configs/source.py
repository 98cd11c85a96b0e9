"""Read a YAML file into a plain container, keeping every mistake.

PyYAML is used for the structure only (duplicate keys, line numbers); values are read by OmegaConf, which
takes `3e-4` and `60_000` as the numbers they are.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.yaml_text import shallow
from hope.sections import Problem

MERGE_KEY = "<<"
# YAML 1.1 reads 012 as the octal 10 and 1:30 as 90: numbers that no one means in a training config.
SURPRISES = (
    (re.compile(r"[-+]?0\d[\d_]*"), "an octal number"),
    (re.compile(r"\d+(:\d\d)+"), "a base-60 number"),
)


def read_yaml(path: str, problems: list[Problem]) -> tuple[DictConfig, dict[str, int]]:
    """The file's container and the line (from 1) of every key by dotted path; mistakes go to `problems`."""
    empty = OmegaConf.create({})
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem("(file)", f"cannot read {path}: {reason}", _nearest_file(path)))
        return empty, {}
    try:
        root = yaml.compose(shallow(text), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problems.append(
            Problem("(file)", f"not valid YAML: {one_line(error)}", "check the indentation and quotes there")
        )
        return empty, {}
    if root is None:
        return empty, {}
    if not isinstance(root, yaml.MappingNode):
        problems.append(
            Problem("(file)", "the top level is not a mapping", "sections such as `train:` with keys below")
        )
        return empty, {}
    lines: dict[str, int] = {}
    problems += _check_nodes(root, "", lines, set())
    try:
        return OmegaConf.create(yaml.serialize(root)), lines
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        problems.append(Problem("(file)", f"not valid YAML: {one_line(error)}", "check the values there"))
        return empty, lines


def _check_nodes(node: yaml.Node, path: str, lines: dict[str, int], seen: set[int]) -> Iterator[Problem]:
    """Drop and report duplicate keys (the first stays), report surprising scalars, note every key's line."""
    if id(node) in seen:  # an alias: its anchor was checked
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _check_nodes(item, f"{path}[{index}]", lines, seen)
    elif isinstance(node, yaml.MappingNode):
        kept = []
        firsts: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            child = f"{path}.{name}" if path else name
            if name != MERGE_KEY and name in firsts:
                yield Problem(child, f"given twice, on lines {firsts[name]} and {line}", "keep one of them")
                continue
            firsts[name] = line
            lines[child] = line
            kept.append((key, value))
            yield from _check_nodes(value, child, lines, seen)
        node.value = kept
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        for pattern, kind in SURPRISES:
            if pattern.fullmatch(node.value):
                yield Problem(
                    path,
                    f"YAML reads {node.value} as {kind}",
                    "write a decimal number, or quote it if it is a text",
                )


def _nearest_file(path: str) -> str:
    """Configuration files with a similar name, in the same folder or in configs/."""
    folders = dict.fromkeys([os.path.dirname(path) or ".", "configs"])
    files = [str(found) for folder in folders for found in sorted(Path(folder).glob("*.yaml"))]
    near = difflib.get_close_matches(path, files, n=3, cutoff=0.5)
    return "did you mean: " + " · ".join(near) if near else "give the path of a YAML file"


def one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        return f"{getattr(error, 'problem', None) or error} ({where})"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def plain(raw: Any) -> dict[Any, Any]:
    """The container as dicts and lists, interpolations left as they are."""
    return OmegaConf.to_container(raw, resolve=False)  # type: ignore[return-value]
