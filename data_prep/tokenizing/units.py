"""How input files are cut into units of work: byte ranges that end at newlines, whole files, row groups."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.jsonl import is_compressed

FORMATS = ("auto", "jsonl", "text", "lines", "parquet")
_TEXT_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class InputUnit:
    """A piece of one file.

    Attributes:
        path: the file.
        format: jsonl, lines (one document per line), text (the file is one document) or parquet.
        start, stop: byte offsets of the range; for parquet the number of the row group, and one more.
        size: bytes on disk, for the progress line.
    """

    path: str
    format: str
    start: int
    stop: int
    size: int


def format_of(path: str, asked: str = "auto") -> str:
    """The format that a file name (without .gz or .zst) speaks of: .parquet, .txt/.md/.rst, else JSON lines."""
    if asked != "auto":
        return asked
    name = Path(path)
    suffix = name.with_suffix("").suffix if is_compressed(name) else name.suffix
    if suffix == ".parquet":
        return "parquet"
    return "text" if suffix in _TEXT_SUFFIXES else "jsonl"


def plan(paths: Iterable[str], asked: str, unit_bytes: int) -> list[InputUnit]:
    """All units of all files, in input order; depends on the files and `unit_bytes` only.

    Raises:
        DataError: a file is missing, or is parquet and pyarrow is not installed.
    """
    units: list[InputUnit] = []
    for path in paths:
        if os.path.isdir(path):
            raise DataError(f"{path}: a folder; name its files, for example {path}/*.jsonl")
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
        kind, size = format_of(path, asked), os.path.getsize(path)
        if kind == "parquet":
            units += _row_groups(path, size)
        elif kind == "text" or is_compressed(path):
            units.append(InputUnit(path, kind, 0, size, size))  # a compressed file can only be read from its start
        else:
            units += [
                InputUnit(path, kind, start, stop, stop - start) for start, stop in _ranges(path, size, unit_bytes)
            ]
    return units


def _ranges(path: str, size: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `unit_bytes` that end just after a newline, or at the end of the file."""
    start = 0
    with open(path, "rb") as stream:
        while start < size:
            stop = min(start + unit_bytes, size)
            if stop < size:
                stream.seek(stop - 1)
                stream.readline()
                stop = stream.tell()
            yield start, stop
            start = stop


def _row_groups(path: str, size: int) -> list[InputUnit]:
    groups = open_parquet(path).metadata.num_row_groups
    return [InputUnit(path, "parquet", group, group + 1, size // groups) for group in range(groups)]


def open_parquet(path: str) -> Any:
    """pyarrow's ParquetFile; raises DataError if pyarrow is missing or the file is damaged."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: reading parquet needs the package pyarrow (`pip install pyarrow`);"
            " or write the rows as JSON lines"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None
