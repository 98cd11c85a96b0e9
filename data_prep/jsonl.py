"""Lines of JSON: one object with a string "text" per line; plain, gzip (.gz) or Zstandard (.zst)."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError

_CHUNK = 1 << 20


@contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes, decompressed if the name ends in .gz or .zst.

    Raises:
        DataError: missing file, damaged or truncated compression, or .zst without the package zstandard.
    """
    path = Path(path)
    try:
        with _stream(path) as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, _Damaged) as error:
        raise DataError(f"{path}: damaged or truncated compression ({error}); compress or copy it again") from None


def is_compressed(path: str | Path) -> bool:
    """True for files that can only be read from the start."""
    return Path(path).suffix in (".gz", ".zst")


def _stream(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"), _CHUNK)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), _CHUNK)
    return open(path, "rb")


class _Damaged(Exception):
    """A compressed stream that breaks off or cannot be decoded."""


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one after another. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError:
            raise DataError(
                f"{path}: reading .zst needs the package zstandard (`pip install zstandard`);"
                " or unpack it with `zstd -d`, or use .gz"
            ) from None
        self._zstandard: Any = zstandard
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise _Damaged("the last frame is not complete")
                return 0
            self._ready = self._decode(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
        pieces = []
        try:
            while data:
                if self._frame is None:
                    self._frame = self._zstandard.ZstdDecompressor().decompressobj()
                pieces.append(self._frame.decompress(data))
                if not self._frame.eof:
                    break
                data, self._frame = self._frame.unused_data, None
        except self._zstandard.ZstdError as error:
            raise _Damaged(str(error)) from None
        return b"".join(pieces)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


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
    value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"no text under the key {key!r}; keys are {sorted(value)}")
    return text
