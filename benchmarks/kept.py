"""Plans and rows of measurements in files: read with an error in words, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from configs.source import one_line
from data_prep.yaml_text import shallow
from hope.fields import NUMBER, POSITIVE, TEXT, WHOLE, Kind, Wrong, by_name, each, inside, one, optional, record
from hope.nesting import is_number, json_of
from hope.train.plot.picture import Picture
from hope.train.written import replace_text

ROWS = "a file that --json of this program wrote"
PLAN = "a plan such as benchmarks/recipe.yaml"

_MEASURED = record({"value": NUMBER})
_SHARE = record({"value": one(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")})
FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("model", "optimizer", "probe"), TEXT),
    **dict.fromkeys(("lr", "lr_elementwise", "rate", "seconds"), NUMBER),
    **dict.fromkeys(("parameters", "tokens_per_s"), POSITIVE),
    **dict.fromkeys(("heldout", "train_loss"), optional(NUMBER)),
    "seed": WHOLE,
    "sources": each(TEXT),
    "matrix": each(each(NUMBER)),
    "measures": by_name(optional(NUMBER)),
    "reach": by_name(_MEASURED),
    "tests": by_name(
        record({"accuracy": _SHARE, "nats_per_token": _MEASURED, "state_bytes": optional(WHOLE)}), least=1
    ),
}
"""Of rows: in those of every program a name means the same."""
_PROBE = {"options": each(TEXT), "models": each(TEXT), "rates": each(POSITIVE), "seeds": each(WHOLE)}


def _words(place: str, value: Any) -> Iterator[Wrong]:
    """Lists of words within lists, which anchors make."""
    return each(_words)(place, value) if isinstance(value, list) else TEXT(place, value)


_MODELS = by_name(each(_words), least=1)
PLANNED: dict[str, Kind] = {
    "config": TEXT,
    "common": each(TEXT),
    "models": _MODELS,
    "optimizers": by_name(record({"set": each(TEXT), "lr": each(POSITIVE), "lr_elementwise": each(POSITIVE)})),
    "order": each(one(lambda v: isinstance(v, list) and [*map(type, v)] == [str, str], "[optimizer, model]")),
    "seeds": each(WHOLE, least=1),
    "reaches": each(WHOLE),
    **dict.fromkeys(("eval_every", "checkpoint_every"), WHOLE),
    "probes": by_name(record(_PROBE)),
    "needle": record({"config": TEXT, "common": each(TEXT), "models": _MODELS, "options": each(TEXT)}),
}
"""The same of plans."""


class Named(dict[str, Any]):
    """A plan, or a row, of a file, and what is inside. Ends the program with 2 where a key is asked for that it lacks.

    place: of it in the file, such as `row 3: `.
    """

    def __init__(self, path: Path, what: str, found: dict[str, Any], place: str = "") -> None:
        parts = {key: Named(path, what, part, inside(place, key)) if isinstance(part, dict) else part
                 for key, part in found.items()}  # fmt: skip
        super().__init__(parts)
        self._path, self._what, self._place = path, what, place

    def __missing__(self, key: str) -> NoReturn:
        refuse(self._path, f"{self._place.removesuffix(': ')} lacks {key!r}".strip(), self._what)


def plan_of(path: Path) -> dict[str, Any]:
    """The plan in a YAML file. Ends the program with 2 if there is none."""
    found = _read(path, lambda text: yaml.safe_load(shallow(text)), PLAN)
    return _named(path, PLAN, found, PLANNED) if isinstance(found, dict) else refuse(path, "is no mapping", PLAN)


def rows_of(path: Path, *, new: bool = False) -> list[dict[str, Any]]:
    """The rows in a JSON file. Ends the program with 2 if there are none. new: no file is no rows."""
    if new and not path.exists():
        return []
    found = _read(path, json_of, ROWS)
    whole = isinstance(found, list) and all(isinstance(row, dict) for row in found)
    if not whole:
        refuse(path, "is no list of rows", ROWS)
    return [_named(path, ROWS, row, FIELDS, f"row {number}: ") for number, row in enumerate(found, 1)]


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
        refuse(path, f"cannot be written: {error.strerror}", "a file in a folder that exists and has room")


def _named(path: Path, what: str, found: dict[str, Any], fields: dict[str, Kind], place: str = "") -> Named:
    for wrong in record(fields)(place, found):
        refuse(path, str(wrong), what)
    return Named(path, what, found, place)


def keep_picture(path: Path, rows: Path, draw: Callable[[], Picture]) -> None:
    """The same with a picture of what is in the file `rows`. Ends the program with 2 if `draw` raises ValueError."""
    try:
        picture = draw()
    except ValueError as error:
        refuse(rows, f"cannot be drawn: {error}", ROWS)
    keep_text(path, picture.svg())


def _read(path: Path, parse: Callable[[str], Any], wanted: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}", wanted)
    except (ValueError, yaml.YAMLError) as error:
        refuse(path, f"cannot be read: {one_line(error)}", wanted)


def refuse(path: Path, what: str, wanted: str) -> NoReturn:
    """End the program with 2."""
    print(f"{path} {what}; {wanted} works", file=sys.stderr)
    raise SystemExit(2)
