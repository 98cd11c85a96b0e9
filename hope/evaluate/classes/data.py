"""Texts with a class each, from files in the formats of CLINC150 and of Banking77.

CLINC150 (Larson et al., 2019), `data_full.json`: one object with "train" and "test", each a list of [text, intent].
"val" and the sets out of scope ("oos_train", ...) are not read. Banking77 (Casanueva et al., 2020), `train.csv` and
`test.csv`: the header `text,category`, then one example a record.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hope.evaluate.errors import EvaluationError
from hope.nesting import json_of

HEADER = ["text", "category"]


class Example(NamedTuple):
    """A text and the name of its class, as the file has them."""

    text: str
    label: str


class Labelled(NamedTuple):
    """Examples to learn from and to be asked, in the order of their files; both have the same classes."""

    train: list[Example]
    test: list[Example]

    def labels(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted({example.label for example in self.train})

    def first(self, train: int | None, test: int | None) -> Labelled:
        """At most so many examples of each class, the first ones of the file; None: all."""
        return Labelled(_first(self.train, train), _first(self.test, test))


def read(path: Path, test: Path | None = None) -> Labelled:
    """The examples of a `.json` file, or of two `.csv` files, of which `test` is the second.

    Raises:
        EvaluationError: a file that cannot be read or has another format, or a bad item with its line or place.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        if test is not None:
            raise EvaluationError(f"--test {test}: {path} has a test set of its own; leave it out")
        content = _json(path)
        found = Labelled(_part(content, "train", path), _part(content, "test", path))
    elif suffix == ".csv":
        if test is None:
            raise EvaluationError(f"--data {path} has examples to learn from only; --test FILE.csv names those to ask")
        found = Labelled(_csv(path), _csv(test))
    else:
        raise EvaluationError(f"{path}: expected a .json file as of CLINC150, or a .csv file as of Banking77")
    return _checked(found, path, test)


def shown(label: str) -> str:
    """A class name as a prompt has it: spaces for underscores, as `card_arrival` is."""
    return label.replace("_", " ").strip()


def _checked(found: Labelled, path: Path, test: Path | None) -> Labelled:
    known = found.labels()
    where = test or path
    asked = {example.label for example in found.test}
    for side, file, lacking in (("examples to learn from", path, asked - set(known)),
                                ("test examples", where, set(known) - asked)):  # fmt: skip
        if lacking:
            names = ", ".join(sorted(lacking)[:3])
            raise EvaluationError(f"{file}: {len(lacking)} classes have no {side}, such as {names}")
    by_text: dict[str, str] = {}
    for label in known:
        other = by_text.setdefault(shown(label), label)
        if other != label:
            raise EvaluationError(f"{path}: classes {other} and {label} are one text, {shown(label)!r}, in a prompt")
    return found


def _first(examples: Sequence[Example], count: int | None) -> list[Example]:
    seen: dict[str, int] = {}
    found = []
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        if count is None or seen[example.label] <= count:
            found.append(example)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: byte {error.start} is not UTF-8") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json_of(_text(path))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}:{error.lineno}: not JSON, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise EvaluationError(f'{path}: expected an object with "train" and "test", found {type(found).__name__}')
    return found


def _part(content: dict[str, Any], key: str, path: Path) -> list[Example]:
    pairs = content.get(key)
    if not isinstance(pairs, list) or not pairs:
        what = "there is none" if key not in content else "it is empty" if pairs == [] else "it is no list"
        raise EvaluationError(f'{path}: need "{key}", a list of [text, class]; {what}')
    return [_example(pair, f"{path}: {key}[{number}]") for number, pair in enumerate(pairs)]


def _csv(path: Path) -> list[Example]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    found: list[Example] = []
    try:
        header = next(reader, [])
        if header != HEADER:
            raise EvaluationError(f"{path}:1: the header is {','.join(header)!r}; need {','.join(HEADER)!r}")
        for record in reader:
            if record:  # an empty line is none
                found.append(_example(record, f"{path}:{reader.line_num}"))
    except csv.Error as error:
        raise EvaluationError(f"{path}:{reader.line_num}: {error}") from None
    if not found:
        raise EvaluationError(f"{path}: no examples after the header")
    return found


def _example(pair: Any, where: str) -> Example:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise EvaluationError(f"{where}: need a text and a class, found {str(pair)[:80]}")
    text, label = (part.strip() for part in pair)
    if not text or not shown(label):
        raise EvaluationError(f"{where}: the {'class' if text else 'text'} is empty")
    return Example(text, label)
