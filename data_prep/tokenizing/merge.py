"""Parts in input order to PREFIX.bin/.idx; of documents that share a key the first is kept."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import IndexedWriter
from data_prep.tokenizing.shard import DOCUMENT, finished_part


@dataclass
class Merged:
    """Counts over what was written."""

    text_bytes: int = 0
    repeated: int = 0
    seen: set[bytes] = field(default_factory=set)


def merge(bases: Iterable[str], writer: IndexedWriter) -> Merged:
    """Append all parts to `writer`.

    Raises:
        DataError: a part's bytes are not those that its record speaks of; the part is removed, so that the
            same command makes it again.
    """
    merged = Merged()
    for base in bases:
        documents = np.load(f"{base}.npy")
        data = _checked(base)
        keep = _kept(base, len(documents), merged)
        merged.text_bytes += int(documents["bytes"][keep].sum())
        merged.repeated += int((~keep).sum())
        for piece, lengths in _runs(data, documents, keep, writer.dtype.itemsize):
            writer.add_encoded(piece, lengths)
    return merged


def _checked(base: str) -> bytes:
    record, data = finished_part(base), Path(f"{base}.bin").read_bytes()
    if record is None or hashlib.sha256(data).hexdigest() != record["sha256"]:
        Path(f"{base}.json").unlink(missing_ok=True)
        raise DataError(f"{base}.bin: not the bytes that were written; the same command makes this part again")
    return data


def _kept(base: str, count: int, merged: Merged) -> np.ndarray:
    """Bool [count]: False for documents that share a key with an earlier one."""
    keep = np.ones(count, dtype=bool)
    path = Path(f"{base}.keys.npy")
    if not path.exists():
        return keep
    keys_of: dict[int, list[bytes]] = {}
    for number, key in np.load(path).tolist():
        keys_of.setdefault(number, []).append(key)
    for number, keys in keys_of.items():
        if merged.seen.isdisjoint(keys):
            merged.seen.update(keys)
        else:
            keep[number] = False
    return keep


def _runs(data: bytes, documents: np.ndarray, keep: np.ndarray, itemsize: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Bytes and lengths of every unbroken run of kept documents."""
    assert documents.dtype == DOCUMENT
    ends = np.concatenate([[0], np.cumsum(documents["tokens"]) * itemsize])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        yield data[ends[first] : ends[last]], documents["tokens"][first:last]
