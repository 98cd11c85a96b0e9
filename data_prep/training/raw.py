"""A folder of raw uint16 token files as a source: *.bin without header, or *.npy, one stream in order of name.

FOLDER/raw.json says what the bytes cannot: {"eos_id": 2, "vocab_size": 32000}, and optionally "tokens", the number
of tokens in all files together, which is then checked. Both numbers may stand in the configuration instead.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from hope.nesting import json_of

DTYPE = np.dtype("<u2")
DESCRIPTION = "raw.json"
_NPY_MAGIC = b"\x93NUMPY"
_BLOCK, _BLOCKS = 1 << 16, 16
_SCAN = 1 << 24  # tokens searched for ends of documents at once: 32 MB


def is_raw_folder(path: str | Path) -> bool:
    """A folder that is not at the same time the prefix of a .bin/.idx pair beside it."""
    return os.path.isdir(path) and not os.path.exists(f"{path}.idx")


class RawFolder:
    """Tokens of all files of a folder, one after the other; see `data_prep.training.index_store.TokenStore`.

    The fingerprint covers names, sizes and, of files over 1 MiB, 16 blocks of 64 KiB: a hash of everything would
    cost minutes per start at 100 GB. `tokenizer` is "", since no file says what the ids mean.
    """

    tokenizer = ""
    tokenizer_path = ""
    bytes_per_token = float("nan")

    def __init__(self, folder: str | Path, eos_id: int = -1, vocab_size: int = 0) -> None:
        """`eos_id` -1 and `vocab_size` 0 mean: as raw.json says.

        Raises:
            DataError: no token files, a file that is not whole uint16 numbers, no or wrong eos and vocabulary, or
                another number of tokens than raw.json announces.
        """
        self.name = os.path.normpath(folder)
        described = _description(Path(folder))
        self.eos_id = eos_id if eos_id >= 0 else described.get("eos_id", -1)
        self.vocab_size = vocab_size or described.get("vocab_size", 0)
        if not 0 <= self.eos_id < self.vocab_size <= 1 << 16:
            raise DataError(
                f"{folder}: eos_id {self.eos_id} and vocab_size {self.vocab_size} cannot be;"
                f' give 0 <= eos_id < vocab_size <= 65536 in the configuration or as {{"eos_id": 2,'
                f' "vocab_size": 32000}} in {Path(folder, DESCRIPTION)}'
            )
        self._files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".bin", ".npy"))
        self._parts = [_open_part(path) for path in self._files]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts], dtype=np.int64)])
        self.tokens = int(self._starts[-1])
        announced = described.get("tokens", self.tokens)
        if self.tokens != announced or self.tokens == 0:
            raise DataError(
                f"{folder}: {self.tokens} tokens in {len(self._parts)} .bin and .npy files,"
                f" {announced or 'at least one'} expected; copy the folder again"
            )
        self.fingerprint = self._fingerprint()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int64.

        Raises DataError if one is outside the vocabulary.
        """
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for part, offset in zip(self._parts[first:], self._starts[first:], strict=False):
            if offset >= stop:
                break
            pieces.append(part[max(0, start - offset) : stop - offset])
        found = np.concatenate(pieces).astype(np.int64)
        if found.size and found.max() >= self.vocab_size:
            at = start + int(found.argmax())
            raise DataError(f"{self.name}: token {at} is {found.max()}, the vocabulary is 0..{self.vocab_size - 1}")
        return found

    def bounds(self) -> np.ndarray:
        """Where documents begin, int64 [documents + 1], the last is the end; reads every token once."""
        ends = [at + 1 for at in self._eos_positions()]
        inner = np.concatenate(ends) if ends else np.empty(0, np.int64)
        bounds = np.concatenate([[0], inner]).astype(np.int64)
        return bounds if bounds[-1] == self.tokens else np.append(bounds, self.tokens)

    def check_unchanged(self, stamp: Path | None) -> None:
        """Nothing to compare with but the sizes, which were checked at the start."""

    def _eos_positions(self) -> Iterator[np.ndarray]:
        for part, offset in zip(self._parts, self._starts[:-1], strict=True):
            for start in range(0, len(part), _SCAN):
                yield np.flatnonzero(part[start : start + _SCAN] == self.eos_id) + start + offset

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"raw uint16 {self.eos_id}".encode())
        for path in self._files:
            size = path.stat().st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            with open(path, "rb") as stream:
                if size <= _BLOCK * _BLOCKS:
                    digest.update(stream.read())
                    continue
                for block in range(_BLOCKS):
                    stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
        return digest.hexdigest()


def _description(folder: Path) -> dict[str, int]:
    path = folder / DESCRIPTION
    try:
        found = json_of(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    good = isinstance(found, dict) and all(type(found.get(key, 0)) is int for key in ("eos_id", "vocab_size", "tokens"))
    if not good:
        raise DataError(f'{path}: need whole numbers, such as {{"eos_id": 2, "vocab_size": 32000}}')
    return found


def _open_part(path: Path) -> np.ndarray:
    """The tokens of one file as a read-only map; an empty file gives an empty array."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        headed = stream.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    if headed:
        try:
            part = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path}: {size} bytes, truncated or no .npy file ({error})") from None
        if part.dtype != DTYPE or part.ndim != 1:
            raise DataError(f"{path}: {part.dtype} of shape {part.shape}; need uint16 in one dimension")
        return part
    if size % DTYPE.itemsize:
        raise DataError(f"{path}: {size} bytes are no whole number of uint16 tokens; copy it again")
    return np.memmap(path, dtype=DTYPE, mode="r") if size else np.empty(0, DTYPE)
