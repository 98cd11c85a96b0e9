"""The records of a unit as they stand in the file: lines, whole texts, or rows of a table."""

from collections.abc import Iterator

from data_prep.compressed import compression_of, open_bytes
from data_prep.errors import DataError
from data_prep.tokenizing.units import InputUnit, open_parquet

_MARK = b"\xef\xbb\xbf"  # the byte-order mark that some editors begin a file with


def records_of(unit: InputUnit) -> Iterator[tuple[int, bytes | dict]]:
    """(byte offset, line without its end) or (row number, row); blank lines are passed over.

    A byte-order mark is left out wherever a line begins: files put together by `cat` have them in the middle.
    """
    if unit.format == "parquet":
        yield from _rows(unit)
        return
    whole = bool(compression_of(unit.path))
    with open_bytes(unit.path) as stream:
        if unit.format == "text":
            yield 0, stream.read().removeprefix(_MARK)
            return
        offset = 0 if whole else stream.seek(unit.start)
        while whole or offset < unit.stop:
            line = stream.readline()
            if not line:
                return
            record = line.removeprefix(_MARK).rstrip(b"\r\n")
            if record.strip():
                yield offset, record
            offset += len(line)


def _rows(unit: InputUnit) -> Iterator[tuple[int, dict]]:
    file = open_parquet(unit.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    batches = file.iter_batches(batch_size=1024, row_groups=[unit.start])
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # what pyarrow's own errors are
            raise DataError(f"{unit.path}: row {row}: not readable ({error}); write the file again") from None
        if batch is None:
            return
        for value in batch.to_pylist():
            yield row, value
            row += 1


def line_number(path: str, offset: int) -> int:
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
