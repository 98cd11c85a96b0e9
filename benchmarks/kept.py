"""Plans and rows of measurements in files: read with an error in words, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from configs.source import one_line
from data_prep.yaml_text import shallow
from hope.nesting import json_of
from hope.train.written import replace_text

ROWS = "a file that --json of this program wrote"
PLAN = "a plan such as benchmarks/recipe.yaml"


class Named(dict[str, Any]):
    """A plan, or a row, of a file. Ends the program with 2 where a key is asked for that it lacks."""

    def __init__(self, path: Path, what: str, found: dict[str, Any]) -> None:
        super().__init__(found)
        self._path, self._what = path, what

    def __missing__(self, key: str) -> NoReturn:
        _refuse(self._path, f"lacks {key!r}", self._what)


def plan_of(path: Path) -> dict[str, Any]:
    """The plan in a YAML file. Ends the program with 2 if there is none."""
    found = _read(path, lambda text: yaml.safe_load(shallow(text)), PLAN)
    return Named(path, PLAN, found) if isinstance(found, dict) else _refuse(path, "is no mapping", PLAN)


def rows_of(path: Path, *, new: bool = False) -> list[dict[str, Any]]:
    """The rows in a JSON file. Ends the program with 2 if there are none. new: no file is no rows."""
    if new and not path.exists():
        return []
    found = _read(path, json_of, ROWS)
    whole = isinstance(found, list) and all(isinstance(row, dict) for row in found)
    return [Named(path, ROWS, row) for row in found] if whole else _refuse(path, "is no list of rows", ROWS)


def pair(word: str) -> tuple[str, Any]:
    """KEY=VALUE of a command line, VALUE as YAML, for argparse."""
    key, _, value = word.partition("=")
    try:
        return key, yaml.safe_load(shallow(value))
    except (ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{word}: {one_line(error)}") from None


def keep(path: Path, rows: Any) -> None:
    """Let the file hold rows, or an object; the old ones stay until all is on disk. Ends the program with 2 if not."""
    keep_text(path, json.dumps(rows, indent=1) + "\n")


def keep_text(path: Path, text: str) -> None:
    """The same with a text."""
    try:
        replace_text(path, text)
    except OSError as error:
        _refuse(path, f"cannot be written: {error.strerror}", "a file in a folder that exists and has room")


def _read(path: Path, parse: Callable[[str], Any], wanted: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}", wanted)
    except (ValueError, yaml.YAMLError) as error:
        _refuse(path, f"cannot be read: {one_line(error)}", wanted)


def _refuse(path: Path, what: str, wanted: str) -> NoReturn:
    print(f"{path} {what}; {wanted} works", file=sys.stderr)
    raise SystemExit(2)
