"""A corpus of several sources: OUT/SOURCE/train.jsonl, heldout.jsonl and manifest.json, and OUT/manifest.json.

Documents are compared with those of all earlier sources before any is held out, and the hash that holds a
document out is that of its text: the same text never stands on both sides, not even in two corpora.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpora.corpus import FILES, Document, split, write_documents
from data_prep.errors import DataError
from data_prep.files import make_folder, sha256_file, write_json
from hope.nesting import json_of

HELDOUT_SHARE = 0.02
SHORTEST_CHARACTERS = 20
Report = Callable[[str], None]


@dataclass(frozen=True)
class CorpusSource:
    """One source: a recipe that identifies how its text is made, and its documents (read only when needed)."""

    name: str
    licence: str
    recipe: dict
    documents: Callable[[], Iterable[Document]]


def build(out: str | Path, parts: Iterable[CorpusSource], share: float = HELDOUT_SHARE, report: Report = print) -> dict:
    """Write every part and the manifest of all; parts that are complete from the same recipe are kept.

    Returns: the manifest, {"sources": {name: {...}}, "documents", "bytes", "heldout_share"}.

    Raises:
        DataError: a source has fewer than two different documents, so that it cannot be split.
    """
    out = Path(out)
    seen: set[bytes] = set()
    sources: dict[str, dict] = {}
    order: list[str] = []
    for part in parts:
        # what was dropped as repeated depends on the sources before
        recipe = {**part.recipe, "heldout_share": share, "after": list(order)}
        order.append(part.name)
        record = _finished(out / part.name, recipe)
        kept = record is not None
        if record is None:
            record = _write_part(out / part.name, part, recipe, share, seen)
        else:
            seen.update(_digests(out / part.name))
        sources[part.name] = record
        report(_line(part.name, record, kept=kept))
    manifest: dict[str, Any] = {
        "sources": sources,
        "heldout_share": share,
        "documents": sum(_total(record, "documents") for record in sources.values()),
        "bytes": sum(_total(record, "bytes") for record in sources.values()),
    }
    write_json(out / "manifest.json", manifest)
    report(f"total      {manifest['documents']:,} documents, {manifest['bytes'] / 1e6:.1f} MB of text in {out}")
    return manifest


def _write_part(folder: Path, part: CorpusSource, recipe: dict, share: float, seen: set[bytes]) -> dict:
    started = time.monotonic()
    make_folder(folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    unique: list[Document] = []
    counts = {"repeated": 0, "short": 0}
    for document in part.documents():
        digest = hashlib.sha256(document.text.encode()).digest()
        if len(document.text) < SHORTEST_CHARACTERS:
            counts["short"] += 1
        elif digest in seen:
            counts["repeated"] += 1
        else:
            seen.add(digest)
            unique.append(document)
    if len(unique) < 2:
        raise DataError(f"source {part.name}: {len(unique)} different documents cannot be split; leave it out")
    files = {}
    for name, documents in zip(FILES, split(unique, share, key=lambda document: document.text), strict=True):
        files[name] = write_documents(folder / name, documents)
    record = {"licence": part.licence, "recipe": recipe, "files": files, **counts}
    record["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "manifest.json", record)
    return record


def _finished(folder: Path, recipe: dict) -> dict | None:
    """The record of a part made by this recipe whose files are intact; else None."""
    try:
        record = json_of((folder / "manifest.json").read_bytes())
        if record["recipe"] != recipe:
            return None
        intact = all(sha256_file(folder / name) == record["files"][name]["sha256"] for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if intact else None


def _digests(folder: Path) -> Iterable[bytes]:
    for name in FILES:
        with open(folder / name, "rb") as stream:
            for line in stream:
                yield hashlib.sha256(json_of(line)["text"].encode()).digest()


def _total(record: dict, field: str) -> int:
    return sum(record["files"][name][field] for name in FILES)


def _line(name: str, record: dict, *, kept: bool) -> str:
    train, heldout = (record["files"][file] for file in FILES)
    return (
        f"{name:10} {train['documents']:6,} documents {train['bytes'] / 1e6:6.2f} MB,"
        f" held out {heldout['documents']:4,} {heldout['bytes'] / 1e6:5.2f} MB,"
        f" repeated {record['repeated']:4}, short {record['short']:3},"
        f" {'kept' if kept else str(record['seconds']) + ' s'}  {record['licence']}"
    )
