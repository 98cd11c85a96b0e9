"""How input files are cut into units of work: byte ranges that end at newlines, whole files, row groups."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.compressed import compression_of, plain_name
from data_prep.errors import DataError
from data_prep.paths import naming
from data_prep.tokenizing.inputs import TEXT_SUFFIXES
from data_prep.tokenizing.sniff import check_head

FORMATS = ("auto", "jsonl", "text", "lines", "parquet")


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
    """The format that a name without .gz and the like speaks of: .parquet, .txt/.md/.rst, else JSON lines."""
    if asked != "auto":
        return asked
    suffix = plain_name(path).suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    return "text" if suffix in TEXT_SUFFIXES else "jsonl"


def plan(paths: Iterable[str], asked: str, unit_bytes: int) -> list[InputUnit]:
    """All units of all files, in input order; depends on the files and `unit_bytes` only.

    Raises:
        DataError: a file is missing or unreadable, is not what its format says (see `sniff.check_head`), or is
            parquet and pyarrow is not installed.
    """
    units = cut(paths, asked, unit_bytes)
    for path, kind in dict.fromkeys((unit.path, unit.format) for unit in units):
        if kind != "parquet":
            check_head(path, kind)
    return units


def cut(paths: Iterable[str], asked: str, unit_bytes: int) -> list[InputUnit]:
    """`plan` without a look at what is in the files; raises DataError likewise."""
    units: list[InputUnit] = []
    for path in paths:
        kind, size = format_of(path, asked), _size(path)
        if kind == "parquet":
            units += _row_groups(path, size)
        elif kind == "text" or compression_of(path):
            units.append(InputUnit(path, kind, 0, size, size))  # a compressed file can only be read from its start
        else:
            units += [
                InputUnit(path, kind, start, stop, stop - start) for start, stop in _ranges(path, size, unit_bytes)
            ]
    return units


def _size(path: str) -> int:
    with naming(path):
        status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: a folder; name its files, for example {path}/*.jsonl")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: a pipe or device, and input is read more than once; write it to a file")
    return status.st_size


def _ranges(path: str, size: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `unit_bytes` that end just after a newline, or at the end of the file."""
    start = 0
    with naming(path), open(path, "rb") as stream:
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
