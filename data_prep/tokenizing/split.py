"""Files of text to OUT/train.jsonl and OUT/heldout.jsonl. The hash of its text decides the side of a document."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.hooks import load_hook
from data_prep.tokenizing.bad import bad_counts, nothing_left, report_bad
from data_prep.tokenizing.inputs import refuse_twice
from data_prep.tokenizing.records import LONGEST_DOCUMENT, RecordReader, Rules, Text
from data_prep.tokenizing.units import InputUnit, plan
from data_prep.tokenizing.work import source_records, stamps
from hope.nesting import json_of

SIDES = ("train.jsonl", "heldout.jsonl")
_HASHES = 1 << 64


@dataclass
class _Side:
    """What has been written to one file."""

    stream: IO[bytes]
    documents: int = 0
    text_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, text: Text, line: bytes) -> None:
        self.stream.write(line)
        self.digest.update(line)
        self.documents += 1
        self.text_bytes += len(text.text.encode())

    def record(self) -> dict[str, Any]:
        return {"documents": self.documents, "bytes": self.text_bytes, "sha256": self.digest.hexdigest()}


def split_files(
    sources: Sequence[str], out: str | Path, share: float, rules: Rules | None = None, licence: str = ""
) -> dict[str, Any]:
    """Write both files and OUT/manifest.json, in input order; returns the manifest.

    A record of JSON lines keeps all its fields, and any other document becomes {text_key: text}. The same text is
    always on the same side: in another order, in other files, beside other text. At least one document is held out
    and at least one is not.

    Args:
        share: of the documents to hold out, between 0 and 1.

    Raises:
        DataError: a bad record as in `tokenize`, fewer than two different texts, a file that would be overwritten.
    """
    rules = replace(rules or Rules(), max_bytes=LONGEST_DOCUMENT)
    if not 0 < share < 1:
        raise DataError(f"--heldout {share} is not a share between 0 and 1; 0.01 works")
    out = Path(out)
    refuse_twice(sources)
    _check_place(out, sources)
    units, before = plan(sources, rules.format, 1 << 62), stamps(sources)
    limit = round(share * _HASHES)
    with ExitStack() as stack:
        sides = [_Side(stack.enter_context(atomic_write(out / name))) for name in SIDES]
        records, hashes = _write(units, rules, limit, sides)
        if not all(side.documents for side in sides):
            limit = hashes[0] + 1 if not sides[1].documents else hashes[1]
            for side in sides:
                side.stream.seek(0)
                side.stream.truncate()
            sides = [_Side(side.stream) for side in sides]
            records, _ = _write(units, rules, limit, sides)
        if stamps(sources) != before:
            raise DataError(f"{out}: an input file changed while it was read; run the same command again")
        manifest = _manifest(sides, source_records(sources, licence), share, rules)
        (out / "manifest.json").unlink(missing_ok=True)
    report_bad(records, out / "split")
    write_json(out / "manifest.json", {**manifest, "bad": bad_counts(records)})
    return {**manifest, "bad": bad_counts(records)}


def _write(
    units: list[InputUnit], rules: Rules, limit: int, sides: list[_Side]
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Documents with a hash below `limit` to sides[1], others to sides[0]; bad records, smallest and largest hash."""
    hook, records, smallest, largest = load_hook(rules.hook), [], _HASHES, -1
    for unit in units:
        reader = RecordReader(unit, rules, hook)
        for text in reader.texts():
            number = int.from_bytes(hashlib.sha256(text.text.encode()).digest()[:8], "big")
            smallest, largest = min(smallest, number), max(largest, number)
            sides[number < limit].add(text, _line(unit, rules, text))
        records.append(asdict(reader.tally))
    if largest < 0:
        raise DataError(nothing_left(units, rules, records))
    if smallest >= largest:
        count = sum(side.documents for side in sides)
        raise DataError(
            f"{', '.join(dict.fromkeys(unit.path for unit in units))}: {count} documents with"
            " 1 different text cannot be split; give at least 2, and cut a single long text into several"
        )
    return records, (smallest, largest)


def _line(unit: InputUnit, rules: Rules, text: Text) -> bytes:
    document = text.document if unit.format == "jsonl" else {rules.text_key: text.text}
    try:
        return (json.dumps(document, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair in another field
        return (json.dumps(document) + "\n").encode()


def _manifest(sides: list[_Side], files: list[dict[str, Any]], share: float, rules: Rules) -> dict[str, Any]:
    """In the form that a source of a corpus has, so that `tokenize` takes the licence from it."""
    return {
        "licence": "; ".join(dict.fromkeys(file["licence"] for file in files if file["licence"])),
        "recipe": {"heldout_share": share, "sources": files, "rules": json_of(rules.identity())},
        "files": {name: side.record() for name, side in zip(SIDES, sides, strict=True)},
    }


def _check_place(out: Path, sources: Sequence[str]) -> None:
    """Refuse to write over an input, or over a file that no earlier split has written."""
    inputs = {os.path.realpath(source) for source in sources}
    try:
        ours = set(json_of((out / "manifest.json").read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    for name in SIDES:
        path = out / name
        if os.path.realpath(path) in inputs:
            raise DataError(f"{path}: is an input and would be written over; another --out works")
        if path.exists() and name not in ours:
            raise DataError(f"{path}: exists, and no split has written it; move it away, or take another --out")
