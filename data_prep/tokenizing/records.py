"""Documents out of a unit of input, and what is done with records that are not as they should be."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from data_prep.errors import DataError
from data_prep.hooks import Hook, digest, keys_of
from data_prep.jsonl import open_bytes
from data_prep.tokenizing.tokenizer import replace_lone_surrogates
from data_prep.tokenizing.units import InputUnit, open_parquet

BAD_KINDS = ("bad_json", "bad_utf8", "missing_field", "surrogate", "empty", "too_long")
LONGEST_DOCUMENT = 1 << 30  # the index holds a length in tokens as int32; a token is at least a byte, or EOS


@dataclass(frozen=True)
class Rules:
    """How records become documents; part of what identifies a token set.

    Attributes:
        text_key: field with the text.
        on_bad: "stop" at the first bad record; "skip" it; "replace": bad UTF-8 and lone surrogates become
            U+FFFD, over-long text is cut into several documents, and what cannot be mended is skipped.
        max_bytes: longest document in UTF-8 bytes.
        hook: "module:function" or empty.
        dedup: "exact" keeps the first of documents with the same text; "off".
        format: one of `units.FORMATS`.
    """

    text_key: str = "text"
    on_bad: Literal["skip", "replace", "stop"] = "stop"
    max_bytes: int = 16 << 20
    hook: str = ""
    dedup: Literal["off", "exact"] = "off"
    format: str = "auto"

    def check(self) -> None:
        """Raise DataError for a setting that cannot work."""
        if not 4 <= self.max_bytes <= LONGEST_DOCUMENT:
            raise DataError(f"longest document {self.max_bytes} bytes; 4 to {LONGEST_DOCUMENT} works")
        if self.on_bad not in ("skip", "replace", "stop"):
            raise DataError(f"on_bad {self.on_bad!r}; skip, replace or stop works")

    def identity(self) -> str:
        """All settings, for digests."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class Tally:
    """What became of a unit's records. `records` counts all of them; a bad one stands in `bad_records` too."""

    records: int = 0
    dropped_by_hook: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """One document's text (valid Unicode) and the keys that no later document may share."""

    text: str
    keys: list[bytes]


class _Skipped(Exception):
    """The record gives no document."""


class RecordReader:
    """Reads the documents of units by one set of rules and counts into `tally`."""

    def __init__(self, unit: InputUnit, rules: Rules, hook: Hook | None) -> None:
        self.unit = unit
        self.rules = rules
        self.tally = Tally()
        self._hook = hook

    def texts(self) -> Iterator[Text]:
        """All documents in order.

        Raises:
            DataError: a bad record under on_bad = "stop", an error in the hook, an unreadable file. The
                message has file, byte offset (in the decompressed file; a row number for parquet) and cause.
        """
        for offset, record in _records(self.unit, self.rules.text_key):
            self.tally.records += 1
            try:
                yield from self._documents(offset, record)
            except _Skipped:
                continue

    def _documents(self, offset: int, record: bytes | dict) -> Iterator[Text]:
        document = record if isinstance(record, dict) else self._parse(offset, record)
        document = self._hooked(offset, document)
        text = document.get(self.rules.text_key)
        if not isinstance(text, str):
            found = "none" if text is None else type(text).__name__
            self._bad(offset, "missing_field", self._no_text(document, found))
            raise _Skipped
        if not text.strip():
            self._bad(offset, "empty", "the text has no visible character")
            raise _Skipped
        text = self._valid(offset, text)
        try:
            keys = keys_of(document, text, exact=self.rules.dedup == "exact")
        except ValueError as error:
            raise self._error(offset, f"hook {self.rules.hook}: {error}") from None
        size = len(text.encode())
        if size <= self.rules.max_bytes:
            yield Text(text, keys)
            return
        self._bad(offset, "too_long", f"{size} bytes, the longest allowed is {self.rules.max_bytes}", mended=True)
        for number, piece in enumerate(_pieces(text, self.rules.max_bytes)):
            # a piece must not be taken for a repetition of the piece before it
            yield Text(piece, [digest(f"{number} {key.hex()}") for key in keys])

    def _parse(self, offset: int, record: bytes) -> dict:
        """The object on a line of JSON, or {text_key: text} of plain text."""
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            self._bad(offset, "bad_utf8", f"{error.reason} at byte {error.start} of the record", mended=True)
            text = record.decode("utf-8", "replace")
        if self.unit.format != "jsonl":
            return {self.rules.text_key: text}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._bad(offset, "bad_json", str(error))
            raise _Skipped from None
        if not isinstance(value, dict):
            self._bad(offset, "missing_field", f"expected an object, found {type(value).__name__}")
            raise _Skipped
        return value

    def _hooked(self, offset: int, document: dict) -> dict:
        if self._hook is None:
            return document
        try:
            result = self._hook(document)
        except Exception as error:  # whatever a user's function raises must name the document it was given
            raise self._error(offset, f"hook {self.rules.hook} raised {type(error).__name__}: {error}") from error
        if result is None:
            self.tally.dropped_by_hook += 1
            raise _Skipped
        if not isinstance(result, dict):
            raise self._error(offset, f"hook {self.rules.hook} returned {type(result).__name__}; dict or None works")
        return result

    def _valid(self, offset: int, text: str) -> str:
        repaired = replace_lone_surrogates(text)
        if repaired is not text:
            self._bad(offset, "surrogate", "the text holds half of a surrogate pair", mended=True)
        return repaired

    def _no_text(self, document: dict, found: str) -> str:
        keys = sorted(map(str, document))
        return f"no text under the key {self.rules.text_key!r} (found {found}); keys are {keys[:20]}"

    def _bad(self, offset: int, kind: str, message: str, *, mended: bool = False) -> None:
        """Count a bad record. Returns only if it is `mended` under on_bad = "replace" or cannot be used anyway."""
        if self.rules.on_bad == "stop":
            raise self._error(offset, message, kind)
        keeps = mended and self.rules.on_bad == "replace"
        self.tally.bad[kind] = self.tally.bad.get(kind, 0) + 1
        action = "replaced" if keeps else "skipped"
        self.tally.bad_records.append(
            {"file": self.unit.path, "offset": offset, "kind": kind, "action": action, "message": message}
        )
        if not keeps:
            raise _Skipped

    def _error(self, offset: int, message: str, kind: str = "") -> DataError:
        if self.unit.format == "parquet":
            place = f"row {offset}"
        else:
            place = f"line {_line_number(self.unit.path, offset)}, byte offset {offset}"
        advice = "; --on-bad skip or --on-bad replace goes on" if kind else ""
        return DataError(f"{self.unit.path}: {place}: {kind + ': ' if kind else ''}{message}{advice}")


def _records(unit: InputUnit, text_key: str) -> Iterator[tuple[int, bytes | dict]]:
    """(offset, line without its newline) or (row number, row); blank lines are passed over."""
    if unit.format == "parquet":
        yield from _rows(unit)
        return
    with open_bytes(unit.path) as stream:
        if unit.format == "text":
            yield 0, stream.read().removeprefix(b"\xef\xbb\xbf")
            return
        whole = unit.path.endswith((".gz", ".zst"))
        offset = 0 if whole else stream.seek(unit.start)
        while whole or offset < unit.stop:
            line = stream.readline()
            if not line:
                return
            if line.strip():
                mark = b"\xef\xbb\xbf" if offset == 0 else b""  # some editors begin a file with a byte-order mark
                yield offset, line.removeprefix(mark).rstrip(b"\r\n")
            offset += len(line)


def _rows(unit: InputUnit) -> Iterator[tuple[int, dict]]:
    file = open_parquet(unit.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    for batch in file.iter_batches(batch_size=1024, row_groups=[unit.start]):
        for value in batch.to_pylist():
            yield row, value
            row += 1


def _pieces(text: str, max_bytes: int) -> Iterator[str]:
    """The text cut between characters into parts of at most `max_bytes` UTF-8 bytes."""
    data = text.encode()
    start = 0
    while start < len(data):
        stop = min(start + max_bytes, len(data))
        while stop < len(data) and data[stop] & 0xC0 == 0x80:  # inside a character
            stop -= 1
        yield data[start:stop].decode()
        start = stop


def _line_number(path: str, offset: int) -> int:
    """Lines are counted from 1; only for messages, since a unit does not know what stands before it."""
    lines = 1
    with open_bytes(path) as stream:
        while offset > 0:
            data = stream.read(min(offset, 1 << 20))
            if not data:
                break
            lines += data.count(b"\n")
            offset -= len(data)
    return lines
