"""Files that are either whole or absent: temporary name, fsync, rename."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data_prep.errors import PathError
from data_prep.paths import naming, reason
from hope.train.written import check_replaceable


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file next to `path` for bytes; it becomes `path` only if the block succeeds.

    Raises:
        PathError: a folder that cannot be made or written to, or a full disk.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        check_replaceable(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    # The process id is in the name so that two runs on one folder never write into the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # an error of another file, read inside the block, names itself
        if isinstance(error, OSError) and error.filename in (None, str(temporary)) and not isinstance(error, PathError):
            raise _unwritable(path, error) from None
        raise


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it.

    Raises:
        PathError: the system refuses, or a file has that name.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str | Path, error: OSError) -> PathError:
    return PathError(f"{path}: cannot be written ({reason(error)}); write elsewhere, or mend the rights or space there")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes; raises PathError if it cannot be read."""
    with naming(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
