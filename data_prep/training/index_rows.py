"""Windows of a token stream in file order, and rows of one document each."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.training.index_store import TokenStore

PAD = -1
"""Fills a row behind the end of its document; no token, never a target."""


class Windows(Protocol):
    """What training and evaluation read: windows of seq_len + 1 tokens by number."""

    def __len__(self) -> int: ...

    def window(self, index: int) -> np.ndarray:
        """Int64 [seq_len + 1]: inputs are [:-1], targets [1:]; PAD behind the end of a document row."""

    def real_targets(self, index: int) -> int:
        """Targets of the window that are tokens, not PAD."""


@dataclass(frozen=True)
class StreamWindows:
    """Window k is tokens [k * seq_len, k * seq_len + seq_len], whatever documents it holds.

    Neighbours share one token, so every token but the first is a target once; the last partial window is dropped.
    """

    store: TokenStore
    seq_len: int

    def __len__(self) -> int:
        return max(0, self.store.tokens - 1) // self.seq_len

    def window(self, index: int) -> np.ndarray:
        """Int64 [seq_len + 1], see Windows."""
        start = index * self.seq_len
        return self.store.read(start, start + self.seq_len + 1)

    def real_targets(self, index: int) -> int:
        """All of them: the stream has no padding."""
        return self.seq_len


@dataclass(frozen=True)
class DocumentRows:
    """Rows of one document, or one piece of a longer one.

    A document of n tokens (its end token included) gives ceil((n - 1) / seq_len) rows; neighbours share one token,
    so every token of it but the first is a target exactly once. One of fewer than two tokens gives no row.

    bounds: int64 [documents + 1], where documents begin in the store.
    first_row: int64 [documents + 1], rows before each document; the last entry is the number of rows.
    """

    store: TokenStore
    seq_len: int
    bounds: np.ndarray
    first_row: np.ndarray

    @classmethod
    def of(cls, store: TokenStore, seq_len: int) -> "DocumentRows":
        """Count the rows of every document."""
        bounds = store.bounds()
        return cls(store, seq_len, bounds, rows_before(np.diff(bounds), seq_len))

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def window(self, index: int) -> np.ndarray:
        """Int64 [seq_len + 1], PAD behind the end of the document."""
        start, stop = self._span(index)
        row = np.full(self.seq_len + 1, PAD, np.int64)
        row[: stop - start] = self.store.read(start, stop)
        return row

    def real_targets(self, index: int) -> int:
        """Tokens of the row after its first."""
        start, stop = self._span(index)
        return stop - start - 1

    def _span(self, index: int) -> tuple[int, int]:
        document = int(np.searchsorted(self.first_row, index, side="right")) - 1
        start = int(self.bounds[document]) + (index - int(self.first_row[document])) * self.seq_len
        return start, min(start + self.seq_len + 1, int(self.bounds[document + 1]))


def rows_before(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Rows before each document, int64 [documents + 1], from document lengths in tokens."""
    rows = (np.maximum(lengths.astype(np.int64) - 1, 0) + seq_len - 1) // seq_len
    return np.concatenate([[0], np.cumsum(rows)])
