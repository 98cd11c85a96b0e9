"""PREFIX.work/: the parts of a tokenize run that is not finished, and what identifies them."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from data_prep.errors import DataError
from data_prep.files import make_folder, sha256_file
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.units import InputUnit
from hope.nesting import json_of

PART_FORMAT = 2  # raise when parts are written in another way
Stamp = tuple[int, int]


class WorkFolder:
    """A context manager that holds the folder for one run at a time; a kill releases it.

    Leaving it keeps finished parts, so that the next run resumes from them. Without any, the folder is removed.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def __enter__(self) -> "WorkFolder":
        make_folder(self.path)
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"{self.path}: another run works here; wait for it, or take another --out") from None
        return self

    def base(self, key: str) -> str:
        """Path of a part without suffix."""
        return str(self.path / key)

    def keep_only(self, keys: Iterable[str]) -> None:
        """Remove half-written files and parts of other inputs or settings."""
        wanted = set(keys)
        for path in self.path.iterdir():
            if path.name != "lock" and path.name.split(".")[0] not in wanted:
                path.unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Remove what a killed run has half written beside the work folder; only its owner may write there."""
        for suffix in ("bin", "idx", "manifest.json", "bad.jsonl"):
            for path in self.path.parent.glob(f".{glob.escape(self.path.stem)}.{suffix}.*.tmp"):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The set is published; its parts are needed no more."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(self.path.glob("*.json")):
            self.remove()
        if self._lock is not None:
            self._lock.close()


def stamps(sources: Iterable[str]) -> dict[str, Stamp]:
    """(size, time of change in ns) of every file: cheap, unlike a digest, and read before and after the work."""
    found = {}
    for source in sources:
        status = os.stat(source)
        found[source] = (status.st_size, status.st_mtime_ns)
    return found


def part_key(unit: InputUnit, stamp: Stamp, rules: Rules, hook: str, sha256_tokenizer: str) -> str:
    """Name of a unit's part: equal only if the part's bytes must be equal."""
    unit_of = {**asdict(unit), "path": os.path.abspath(unit.path)}
    identity = [PART_FORMAT, unit_of, stamp, rules.identity(), hook, sha256_tokenizer]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def recipe_of(sources: list[dict[str, Any]], rules: Rules, hook: str, sha256_tokenizer: str) -> str:
    """Digest of all that determines a token set's bytes."""
    identity = [PART_FORMAT, [source["sha256"] for source in sources], rules.identity(), hook, sha256_tokenizer]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def source_records(sources: Sequence[str], licence: str) -> list[dict[str, Any]]:
    """What a manifest says of its input files; the licence is the one that the file's corpus states, if it does."""
    return [
        {
            "name": source,
            "bytes": os.path.getsize(source),
            "sha256": sha256_file(source),
            "licence": _stated_licence(Path(source)) or licence,
        }
        for source in sources
    ]


def _stated_licence(source: Path) -> str:
    try:
        corpus = json_of((source.parent / "manifest.json").read_bytes())
        return str(corpus["licence"]) if source.name in corpus["files"] else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
