"""One face for the places that tokens come from: .bin/.idx pairs and folders of raw files."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.errors import DataError
from data_prep.files import sha256_file, write_json
from data_prep.indexed import memmap_tokens
from data_prep.manifest import open_checked
from data_prep.paths import naming, token_prefix
from data_prep.training.raw import RawFolder, is_raw_folder
from hope.nesting import json_of


class TokenStore(Protocol):
    """A stream of documents.

    Attributes: name (for messages), tokens, vocab_size, eos_id, fingerprint (hex identity of the tokens), tokenizer
    (hex sha256, "" if unknown), tokenizer_path (as given, "" if unknown), bytes_per_token (of text; nan if unknown).
    """

    name: str
    tokens: int
    vocab_size: int
    eos_id: int
    fingerprint: str
    tokenizer: str
    tokenizer_path: str
    bytes_per_token: float

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int64."""

    def bounds(self) -> np.ndarray:
        """Where documents begin, int64 [documents + 1]; the last entry is `tokens`."""

    def check_unchanged(self, stamp: Path | None) -> None:
        """Raise DataError unless the bytes are the recorded ones; the file `stamp` remembers a check that passed."""


class MegatronStore:
    """PREFIX.bin/.idx/.manifest.json after the cheap checks; see TokenStore."""

    def __init__(self, prefix: str) -> None:
        """Raises DataError if a file is missing or truncated, the set is empty, or manifest and index disagree."""
        self.name = prefix
        self._header, self.manifest = open_checked(prefix)
        self.tokens = self.manifest.tokens
        self.vocab_size = self.manifest.vocab_size
        self.eos_id = self.manifest.eos_id
        self.fingerprint = self.manifest.fingerprint
        self.tokenizer = self.manifest.sha256_tokenizer
        self.tokenizer_path = self.manifest.tokenizer
        self.bytes_per_token = self.manifest.bytes_per_token
        self._tokens = memmap_tokens(prefix, self._header)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int64."""
        return self._tokens[start:stop].astype(np.int64)

    def bounds(self) -> np.ndarray:
        """Where documents begin, int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self._header.document_lengths, dtype=np.int64)])

    def check_unchanged(self, stamp: Path | None) -> None:
        """Compare .bin and .idx with the digests in the manifest, unless `stamp` says that was done.

        The stamp holds sizes and times of change, so that 100 GB are hashed once (72 s at 1.4 GB/s), not at every
        start. An edit that keeps size and time of change is not noticed.
        """
        state = {suffix: _state(f"{self.name}.{suffix}") for suffix in ("bin", "idx")}
        if stamp and _content(stamp) == state:
            return
        for suffix, recorded in (("bin", self.manifest.sha256_bin), ("idx", self.manifest.sha256_idx)):
            found = sha256_file(f"{self.name}.{suffix}")
            if found != recorded:
                raise DataError(
                    f"{self.name}.{suffix}: sha256 {found[:12]}..., but its manifest says {recorded[:12]}...: the data"
                    " was changed under the same name; tokenize it again, or restore the file"
                )
        if stamp:
            with suppress(OSError):  # in a read-only folder the next start reads the bytes again
                write_json(stamp, state)


def _content(path: Path) -> object:
    try:
        return json_of(path.read_bytes())
    except (OSError, ValueError):
        return None


def _state(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def open_store(path: str, eos_id: int = -1, vocab_size: int = 0) -> TokenStore:
    """The tokens at `path`: a folder of raw files (with `eos_id` and `vocab_size`, or its raw.json), or a prefix.

    Raises DataError if they are missing, truncated or empty.
    """
    path = token_prefix(path)
    with naming(path):
        return RawFolder(path, eos_id, vocab_size) if is_raw_folder(path) else MegatronStore(path)
