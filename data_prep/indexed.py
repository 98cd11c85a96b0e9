"""Reader and writer of Megatron's token files: PREFIX.bin (token ids) and PREFIX.idx (document lengths).

The bytes are those of megatron-core's IndexedDatasetBuilder with one sequence per document, so every
tool that reads Megatron data reads ours. Only numpy is needed: importing torch and megatron's datasets
costs seconds in each tokenizing process.

.idx, little endian: 9 bytes magic, u64 version = 1, u8 dtype code, u64 number of sequences S,
u64 number of document boundaries S + 1, i32[S] lengths in tokens, i64[S] byte offsets into .bin,
i64[S + 1] document boundaries 0..S.
"""

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.paths import naming

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """Smallest token dtype megatron-core picks for a vocabulary: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Header:
    """What PREFIX.idx says: token dtype and the length of every document in tokens (int32 [documents])."""

    dtype: np.dtype
    document_lengths: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents, empty ones counted."""
        return len(self.document_lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.document_lengths.sum(dtype=np.int64))

    @property
    def bin_bytes(self) -> int:
        """Size that PREFIX.bin must have."""
        return self.tokens * self.dtype.itemsize


def read_header(prefix: str | Path) -> Header:
    """Read and check PREFIX.idx.

    Raises:
        DataError: the file is missing, is not an index, is truncated, or holds several sequences per
            document (other tools can write that; we never do, and read no such files).
    """
    path = f"{prefix}.idx"
    with naming(path), open(path, "rb") as stream:
        raw = stream.read(_HEADER.size)
        magic, version, code, sequences, boundaries = _unpack(path, raw)
        if magic != _MAGIC or version != 1 or code not in _DTYPE_OF_CODE:
            raise DataError(f"{path}: not a Megatron index of int32 or uint16 tokens, version 1")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        actual = os.fstat(stream.fileno()).st_size
        if actual != expected:
            raise DataError(f"{path}: {actual} bytes, but its header announces {expected}; write it again")
        if boundaries != sequences + 1:
            raise DataError(f"{path}: {sequences} sequences in {boundaries - 1} documents; need one each")
        lengths = np.fromfile(stream, dtype="<i4", count=sequences)
    return Header(_DTYPE_OF_CODE[code], lengths)


def _unpack(path: str, raw: bytes) -> tuple[bytes, int, int, int, int]:
    if len(raw) < _HEADER.size:
        raise DataError(f"{path}: {len(raw)} bytes, shorter than an index header ({_HEADER.size}); write it again")
    return _HEADER.unpack(raw)


def check_bin(prefix: str | Path, header: Header) -> None:
    """Raise DataError unless PREFIX.bin has exactly the bytes the index speaks of.

    megatron-core opens a truncated .bin without complaint and fails at some later read.
    """
    path = f"{prefix}.bin"
    with naming(path):
        actual = os.path.getsize(path)
    if actual != header.bin_bytes:
        raise DataError(
            f"{path}: {actual} bytes, but {prefix}.idx speaks of {header.tokens} tokens"
            f" = {header.bin_bytes} bytes; copy or tokenize it again"
        )


def memmap_tokens(prefix: str | Path, header: Header) -> np.ndarray:
    """All tokens of PREFIX.bin as a read-only array [tokens], not loaded into memory."""
    if header.tokens == 0:
        return np.empty(0, dtype=header.dtype)
    with naming(f"{prefix}.bin"):
        return np.memmap(f"{prefix}.bin", dtype=header.dtype, mode="r", shape=(header.tokens,))


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; a context manager.

    Leaving the block normally puts .bin, then .idx in place; leaving it by an exception leaves nothing.
    After a normal exit `sha256_bin` and `sha256_idx` are the files' hex digests.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self.lengths = array("i")  # 4 bytes per document, where a list of 10^8 takes 4 GB
        self.sha256_bin = ""
        self.sha256_idx = ""
        self._stack = ExitStack()
        self._digest = hashlib.sha256()

    def __enter__(self) -> "IndexedWriter":
        self._bin = self._stack.enter_context(atomic_write(f"{self.prefix}.bin"))
        return self

    def add_encoded(self, data: bytes, lengths: np.ndarray) -> None:
        """Append whole documents that already are bytes of `dtype`; `lengths` is in tokens, one per document.

        Raises:
            DataError: the lengths do not add up to the bytes.
        """
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens * self.dtype.itemsize != len(data):
            raise DataError(f"{self.prefix}.bin: {len(data)} bytes for {tokens} tokens of {self.dtype.itemsize} bytes")
        self._bin.write(data)
        self._digest.update(data)
        self.lengths.frombytes(lengths.astype(np.intc).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack.__exit__(kind, error, trace) or error is not None:
            return
        index = _index_bytes(self.lengths, self.dtype)
        with atomic_write(f"{self.prefix}.idx") as stream:
            stream.write(index)
        self.sha256_bin = self._digest.hexdigest()
        self.sha256_idx = hashlib.sha256(index).hexdigest()


def _index_bytes(lengths: Sequence[int], dtype: np.dtype) -> bytes:
    count = len(lengths)
    offsets = np.zeros(count, dtype="<i8")
    np.cumsum(np.asarray(lengths[:-1], dtype=np.int64) * dtype.itemsize, out=offsets[1:])
    header = _HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[dtype], count, count + 1)
    boundaries = np.arange(count + 1, dtype="<i8")
    return header + np.asarray(lengths, dtype="<i4").tobytes() + offsets.tobytes() + boundaries.tobytes()
