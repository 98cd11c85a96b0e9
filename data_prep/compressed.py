"""Bytes of a file, unpacked if it is gzip, bzip2, xz or Zstandard. Its first bytes decide, not its name."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError
from data_prep.paths import naming

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_BEGINNINGS = ((b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "Zstandard"))
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # a block, or the end of an empty file
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a Zstandard frame without content, as pzstd writes first
_CHUNK = 1 << 20


class _Damaged(Exception):
    """A compressed stream that breaks off or cannot be decoded."""


@contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes, unpacked if it is compressed.

    Raises:
        DataError: missing or unreadable file, damaged or truncated compression, a name that promises a compression
            which the bytes are not, or Zstandard without the package zstandard.
    """
    path = Path(path)
    with naming(path):
        kind = compression_of(path)
        try:
            with open(path, "rb") if not kind else io.BufferedReader(_Unpacked(path, kind), _CHUNK) as stream:
                yield stream
        except _Damaged as error:
            raise DataError(f"{path}: damaged or truncated compression ({error}); compress or copy it again") from None


def compression_of(path: str | Path) -> str:
    """gzip, bzip2, xz, Zstandard, or "" for a plain file.

    Raises:
        DataError: unreadable file, or one whose name speaks of another compression than its bytes.
    """
    with naming(path), open(path, "rb") as stream:
        found = _kind_of(stream.read(10))
    promised = SUFFIXES.get(Path(path).suffix.lower(), "")
    if promised and not found:
        raise DataError(
            f"{path}: damaged or truncated compression (byte offset 0: not the beginning of a {promised} file);"
            f" compress or copy it again, or, if it is plain, name it {Path(path).with_suffix('').name}"
        )
    return found


def plain_name(path: str | Path) -> Path:
    """The path without the suffix of a compression."""
    return Path(path).with_suffix("") if Path(path).suffix.lower() in SUFFIXES else Path(path)


def _kind_of(head: bytes) -> str:
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    if head[:1] and head[0] & 0xF0 == 0x50 and head[1:4] == _SKIPPABLE:
        return "Zstandard"
    return next((kind for beginning, kind in _BEGINNINGS if head.startswith(beginning)), "")


class _Unpacked(io.RawIOBase):
    """Streams one after another, each of them complete.

    The readers of the standard library and of zstandard end quietly at a broken second stream or at a cut.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._new, self._errors = _decoder(path, kind)
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._stream: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_CHUNK)
            if not data:
                if self._stream is not None:
                    raise _Damaged("the last stream is not complete")
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
                if self._stream is None:
                    data = data.lstrip(b"\0")  # gzip and xz may be padded with zeros between streams
                    if not data:
                        break
                    self._stream = self._new()
                pieces.append(self._stream.decompress(data))
                if not self._stream.eof:
                    break
                data, self._stream = self._stream.unused_data, None
        except self._errors as error:
            raise _Damaged(str(error) or type(error).__name__) from None
        return b"".join(pieces)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


def _decoder(path: Path, kind: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes the decoder of one stream, and the errors that it raises."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), (zlib.error,)
    if kind == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if kind == "xz":
        return lzma.LZMADecompressor, (lzma.LZMAError,)
    try:
        import zstandard
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: reading Zstandard needs the package zstandard (`pip install zstandard`);"
            " or unpack it with `zstd -d`, or use gzip"
        ) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,)
