"""Documents out of a unit of input, and what is done with records that are not as they should be."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from data_prep.errors import DataError
from data_prep.hooks import Hook, digest, keys_of
from data_prep.tokenizing.outlook import set_text, text_at, what_would_work
from data_prep.tokenizing.raw_records import line_number, records_of
from data_prep.tokenizing.sniff import nul_bytes
from data_prep.tokenizing.tokenizer import replace_lone_surrogates
from data_prep.tokenizing.units import InputUnit
from hope.nesting import json_of

BAD_KINDS = (
    "bad_json", "bad_utf8", "nul_bytes", "repeated_key", "missing_field", "surrogate", "empty", "too_long"
)  # fmt: skip
LONGEST_DOCUMENT = 1 << 30  # the index holds a length in tokens as int32; a token is at least a byte, or EOS
_UNSEEN_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")  # control and format characters, spaces
# letters and marks that are drawn as nothing: fillers, joiner, variation selectors
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10))))


@dataclass(frozen=True)
class Rules:
    """How records become documents; part of what identifies a token set.

    Attributes:
        text_key: field with the text; "data.text" is the field "text" of the object under "data".
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
    """One document's text (valid Unicode), the keys that no later document may share, and its other fields."""

    text: str
    keys: list[bytes]
    document: dict = field(default_factory=dict)


class _Skipped(Exception):
    """The record gives no document."""


class RecordReader:
    """Reads the documents of units by one set of rules and counts into `tally`."""

    def __init__(self, unit: InputUnit, rules: Rules, hook: Hook | None) -> None:
        self.unit = unit
        self.rules = rules
        self.tally = Tally()
        self._hook = hook
        self._given = 0  # documents so far
        self._repeated = ""  # a key that stands twice in the object just read
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def texts(self) -> Iterator[Text]:
        """All documents in order.

        Raises:
            DataError: a bad record under on_bad = "stop", an error in the hook, an unreadable file. The
                message has file, byte offset (in the decompressed file; a row number for parquet) and cause.
        """
        for offset, record in records_of(self.unit):
            self.tally.records += 1
            try:
                for text in self._documents(offset, record):
                    self._given += 1
                    yield text
            except _Skipped:
                continue

    def _documents(self, offset: int, record: bytes | dict) -> Iterator[Text]:
        document = record if isinstance(record, dict) else self._parse(offset, record)
        document = self._hooked(offset, document)
        text = text_at(document, self.rules.text_key)
        if not isinstance(text, str):
            found = "none" if text is None else type(text).__name__
            self._bad(offset, "missing_field", self._no_text(document, found))
            raise _Skipped
        if not has_visible(text):
            self._bad(offset, "empty", "the text has no visible character")
            raise _Skipped
        text = self._valid(offset, text)
        document = set_text(document, self.rules.text_key, text)
        try:
            keys = keys_of(document, text, exact=self.rules.dedup == "exact")
        except ValueError as error:
            raise self._error(offset, f"hook {self.rules.hook}: {error}") from None
        size = len(text.encode())
        if size <= self.rules.max_bytes:
            yield Text(text, keys, document)
            return
        self._bad(offset, "too_long", f"{size} bytes, the longest allowed is {self.rules.max_bytes}", mended=True)
        for number, piece in enumerate(_pieces(text, self.rules.max_bytes)):
            # a piece must not be taken for a repetition of the piece before it
            yield Text(piece, [digest(f"{number} {key.hex()}") for key in keys])

    def _parse(self, offset: int, record: bytes) -> dict:
        """The object on a line of JSON, or {text_key: text} of plain text."""
        if found := nul_bytes(record):
            self._bad(offset, "nul_bytes", f"{found[1]}, the first at byte {found[0]} of the record")
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            self._bad(offset, "bad_utf8", f"{error.reason} at byte {error.start} of the record", mended=True)
            text = record.decode("utf-8", "replace")
        if self.unit.format != "jsonl":
            return {self.rules.text_key: text}
        try:
            self._repeated = ""
            value = json_of(text, self._decoder.decode)
        except ValueError as error:
            self._bad(offset, "bad_json", str(error))
            raise _Skipped from None
        if not isinstance(value, dict):
            self._bad(offset, "missing_field", f"expected an object, found {type(value).__name__}")
            raise _Skipped
        if self._repeated:
            what = f"the key {self._repeated!r} stands twice with different values; `replace` takes the last"
            self._bad(offset, "repeated_key", what, mended=True)
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        """A JSON object; of a key that stands twice the last value counts, as in Python's own reader."""
        found = dict(pairs)
        if len(found) != len(pairs):
            self._repeated = next((key for key, value in pairs if found[key] != value), self._repeated)
        return found

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
            place = f"line {line_number(self.unit.path, offset)}, byte offset {offset}"
        advice = f"; {self._advice(kind)}" if kind else ""
        return DataError(f"{self.unit.path}: {place}: {kind + ': ' if kind else ''}{message}{advice}")

    def _advice(self, kind: str) -> str:
        """Skipping is no help where nothing would be left; a hook may make a text of any field."""
        hopeless = kind in ("bad_json", "missing_field") and not self._given and not self.rules.hook
        other = what_would_work(self.unit, self.rules.text_key) if hopeless else ""
        return other or "--on-bad skip or --on-bad replace goes on"


def has_visible(text: str) -> bool:
    """True if the text shows anything: not only white space, control, zero-width and filler characters."""
    return any(unicodedata.category(letter) not in _UNSEEN_CATEGORIES and letter not in _UNSEEN for letter in text)


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
