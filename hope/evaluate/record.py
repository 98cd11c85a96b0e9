"""What an evaluation has found so far, in one JSON file that is whole at any time, and what of it a rerun may keep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hope.evaluate.errors import EvaluationError
from hope.evaluate.rows import Values
from hope.nesting import json_of
from hope.train.written import replace_text

FORMAT = 2  # 1 had no sums of repeated bigrams
EVERY_S = 5.0  # between two writes of partial results


class Record:
    """Results by source name, and the values of rows of sources that are not finished.

    Args:
        path: of the file; None keeps everything in memory.
        identity: of the model and what changes every score, plain JSON. Another identity in the file is refused.
        about: what else the file should say.

    Raises:
        EvaluationError: the file cannot be read, is no such record, or is of another identity.
    """

    def __init__(
        self,
        path: Path | None,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock = path, clock
        self._content: dict[str, Any] = {"format": FORMAT, "identity": dict(identity), "sources": {}, **about}
        if path is not None and path.exists():
            self._content["sources"] = _read(path, identity)
        self._written = clock()

    def open(self, name: str, identity: Mapping[str, Any], limit: int | None) -> Source:
        """The entry of a source; `identity` says what it is and how it is scored.

        Raises:
            EvaluationError: the file has an entry of this name and another identity.
        """
        entry = self._content["sources"].setdefault(name, {"identity": dict(identity)})
        if entry["identity"] != identity:
            raise EvaluationError(f"{self._path}: {name} {_difference(entry['identity'], identity)}; {_CURE}")
        return Source(self, entry, limit)

    def save(self, *, now: bool = True) -> None:
        """Write the file; not `now`: only if EVERY_S have passed since the last time.

        Raises:
            EvaluationError: it cannot be written.
        """
        if self._path is not None and (now or self._clock() - self._written >= EVERY_S):
            try:
                replace_text(self._path, json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")
            except OSError as error:
                raise EvaluationError(f"{self._path}: cannot be written ({error.strerror}); {_CURE}") from None
            self._written = self._clock()

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds, or would hold."""
        return self._content


class Source:
    """One source's part of a record."""

    def __init__(self, record: Record, entry: dict[str, Any], limit: int | None) -> None:
        self._record, self._entry, self._limit = record, entry, limit
        self.values: dict[int, Values] = {int(key): value for key, value in entry.get("rows", {}).items()}

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if there is one of the same limit."""
        found: dict[str, Any] | None = self._entry.get("result")
        return found if found is not None and self._entry.get("limit") == self._limit else None

    def add(self, values: Mapping[int, Values]) -> None:
        """Values of further rows."""
        self.values.update(values)
        self._entry.setdefault("rows", {}).update({str(key): value for key, value in values.items()})
        self._record.save(now=False)

    def finish(self, result: dict[str, Any], *, keep_rows: bool) -> None:
        """The result; keep_rows: keep the rows' values too, to compare models item by item."""
        self._entry["result"], self._entry["limit"] = result, self._limit
        if not keep_rows:
            self._entry.pop("rows", None)
        self._record.save()


_CURE = "give another --json file, or remove this one"


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json_of(path.read_text(encoding="utf-8"))
        sources: dict[str, Any] = found["sources"]
        known = found["format"] == FORMAT and all("identity" in entry for entry in sources.values())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); {_CURE}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise EvaluationError(f"{path} is not a result of this program; {_CURE}")
    if found["identity"] != identity:
        raise EvaluationError(f"{path} {_difference(found['identity'], identity)}; {_CURE}")
    return sources


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {**old, **new} if old.get(key) != new.get(key))
    short = lambda value: f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
    return "was made with " + ", ".join(f"{k} {short(old.get(k))}, now {short(new.get(k))}" for k in keys)
