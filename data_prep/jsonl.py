"""Lines of JSON: one object with a string "text" per line, compressed or not."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.compressed import open_bytes
from data_prep.errors import DataError
from hope.nesting import json_of


def read_texts(path: str | Path, key: str = "text") -> Iterator[str]:
    """Yield every line's text in file order; blank lines are passed over.

    Raises:
        DataError: the file is missing, or a line is not UTF-8, not JSON, not an object, or has no
            non-empty string under `key`; the message has the line number (from 1) and its byte offset.
    """
    with open_bytes(path) as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield _text_of(line, key)
                except ValueError as error:
                    raise DataError(f"{path}: line {number}, byte offset {offset}: {error}") from None
            offset += len(line)


def _text_of(line: bytes, key: str) -> str:
    value = json_of(line.rstrip(b"\r\n").decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"no text under the key {key!r}; keys are {sorted(value)}")
    return text
