"""Whether any record of a file can give text, and if none can, what would."""

import itertools
from collections import Counter
from typing import Any

from data_prep.tokenizing.raw_records import records_of
from data_prep.tokenizing.units import InputUnit
from hope.nesting import json_of

SAMPLE = 50
_SHOWN = 10


def text_at(document: dict, key: str) -> Any:
    """The value under `key`, or, of a key with dots that no field has, under the path that it spells."""
    if key in document:
        return document[key]
    value: Any = document
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def set_text(document: dict, key: str, text: str) -> dict:
    """A copy of the document with another text where `text_at` finds it."""
    if key in document or "." not in key:
        return {**document, key: text}
    first, rest = key.split(".", 1)
    return {**document, first: set_text(document.get(first, {}), rest, text)}


def what_would_work(unit: InputUnit, text_key: str) -> str:
    """Advice if none of the first records has a text; empty if one has, so that the others can be skipped."""
    records = [_parsed(record) for _, record in itertools.islice(records_of(unit), SAMPLE)]
    documents = [record for record in records if isinstance(record, dict)]
    if any(isinstance(text_at(document, text_key), str) for document in documents):
        return ""
    if not documents:
        return (
            f"none of the first {len(records)} lines is a JSON object; --format lines reads a document per line,"
            " --format text one per file"
        )
    sizes = Counter[str]()
    for document in documents:
        sizes.update(_strings(document))
    none = f"none of the first {len(records)} records has a text under {text_key!r}"
    if not sizes:
        return f"{none}, nor under another key; a --hook can make one"
    keys = [key for key, _ in sizes.most_common(_SHOWN)]
    return f"{none}; --text-key {keys[0]} works" + (f", or another of {', '.join(keys[1:])}" if keys[1:] else "")


def _parsed(record: bytes | dict) -> object:
    if isinstance(record, dict):
        return record
    try:
        return json_of(record)
    except ValueError:
        return None


def _strings(document: dict, before: str = "") -> Counter[str]:
    """Characters under every path that leads to a string."""
    found = Counter[str]()
    for key, value in document.items():
        if isinstance(value, str):
            found[f"{before}{key}"] += len(value)
        elif isinstance(value, dict):
            found.update(_strings(value, f"{before}{key}."))
    return found
