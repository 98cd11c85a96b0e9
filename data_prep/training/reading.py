"""The training side: windows of tokens by sample number, and held-out windows in file order."""

import hashlib
from typing import Protocol

import numpy as np

from data_prep.errors import DataError
from data_prep.training.batches import BatchLoader, global_batch_slice, heldout_batches
from data_prep.training.index_key import IndexKey, too_short_for
from data_prep.training.index_rows import DocumentRows, StreamWindows, Windows
from data_prep.training.index_store import MegatronStore, TokenStore, open_store
from data_prep.training.order import EpochOrder, LaneOrder
from data_prep.training.window_index import agree, open_windows

__all__ = ["BatchLoader", "HeldoutSet", "TrainingSet", "global_batch_slice", "heldout_batches"]

VERIFIED_AT_EVERY_START = 1 << 28  # bytes of held-out tokens: a fraction of a second of hashing


class Samples(Protocol):
    """Anything that has a window for every sample number."""

    def sample(self, number: int) -> np.ndarray: ...


class TrainingSet:
    """Windows of seq_len + 1 tokens; which window a sample is depends on (seed, name, sample number) alone.

    Every epoch visits every window once, in an order of its own; no number of steps enters, so extending
    a run never reshuffles. Windows overlap by one token (the last target is the next first input).

    Attributes: name, seq_len, seed, eos_id, vocab_size, fingerprint_of_data (hex; belongs in checkpoints).
    """

    def __init__(
        self,
        prefix: str,
        seq_len: int,
        seed: int,
        cache_dir: str = "",
        *,
        documents: str = "carry",
        name: str = "",
        eos_id: int = -1,
        vocab_size: int = 0,
        build: bool = True,
        lanes: int = 1,
    ) -> None:
        """Check the files and build or load the index; with torch.distributed, every rank must call this.

        Args:
            prefix: of .bin/.idx, or a folder of raw files.
            documents: "doc" gives one document per row, anything else windows across documents; "stream" those that
                follow one another in `lanes` lanes.
            name: of the source in a blend; gives it an order of its own.
            eos_id: of a raw folder without raw.json, as is `vocab_size`.
            build: build a missing index, instead of refusing.
            lanes: sequences of a step, over all ranks; of no account but for "stream".

        Raises:
            DataError: on every rank, if the set is missing, truncated, changed, empty or shorter than one window.
        """
        error, store = "", None
        try:
            store = _open_for(prefix, seq_len, eos_id, vocab_size, documents)
        except DataError as problem:
            error = str(problem)
        agree(error)
        assert store is not None
        self.name = name
        self.seq_len = seq_len
        self.seed = seed
        self.eos_id = store.eos_id
        self.vocab_size = store.vocab_size
        self.fingerprint_of_data = fingerprint_of_set(store, documents)
        self._windows: Windows = open_windows(store, IndexKey(seq_len, seed, documents), cache_dir, build=build)
        agree("" if len(self._windows) else f"{prefix}: no document has two tokens, which a row needs")
        self._order = EpochOrder(len(self), seed, 0, name)
        self._lanes = LaneOrder(len(self), lanes, seed, name) if documents == "stream" else None

    def __len__(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    def window(self, index: int) -> np.ndarray:
        """Tokens of one window, int64 [seq_len + 1]: inputs are [:-1], targets [1:]; -1 behind a row's document."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside an epoch of {len(self)} windows")
        return self._windows.window(index)

    def sample(self, number: int) -> np.ndarray:
        """The window that sample `number` of the whole run is (counted from 0 over all epochs)."""
        return self.window(self.window_of(number))

    def window_of(self, number: int) -> int:
        """The number of the window that sample `number` is."""
        if self._lanes is not None:
            return self._lanes[number]
        epoch, position = divmod(number, len(self))
        order = self._order
        if epoch != order.epoch:
            order = self._order = EpochOrder(len(self), self.seed, epoch, self.name)
        return order[position]

    def real_targets(self, number: int) -> int:
        """Targets of sample `number` that count: seq_len, or fewer where a row is padded."""
        return self._windows.real_targets(self.window_of(number))

    def fingerprint(self, consumed: int, global_batch: int) -> str:
        """Hash of samples consumed .. consumed + global_batch - 1; see `fingerprint_of`."""
        return fingerprint_of(self, consumed, global_batch)


def fingerprint_of_set(store: TokenStore, documents: str) -> str:
    """What a checkpoint records of a training set: its tokens, and how rows are cut."""
    return store.fingerprint + {"doc": " in rows of one document", "stream": " in lanes"}.get(documents, "")


def fingerprint_of(samples: Samples, consumed: int, global_batch: int) -> str:
    """Hex sha256 of the token ids of samples consumed .. consumed + global_batch - 1.

    The same on every rank and for every layout.
    """
    digest = hashlib.sha256()
    for number in range(consumed, consumed + global_batch):
        digest.update(samples.sample(number).astype("<i8").tobytes())
    return digest.hexdigest()


class HeldoutSet:
    """Windows in file order, never shuffled: window k is tokens[k * seq_len : k * seq_len + seq_len + 1].

    With documents="doc", the rows of one document each, in file order.
    """

    def __init__(
        self, prefix: str, seq_len: int, documents: str = "carry", eos_id: int = -1, vocab_size: int = 0
    ) -> None:
        """Check and open the files; raises DataError as TrainingSet does, but is not collective."""
        store = _open_for(prefix, seq_len, eos_id, vocab_size, documents)
        if isinstance(store, MegatronStore) and store.tokens * 2 <= VERIFIED_AT_EVERY_START:
            store.check_unchanged(None)
        self.seq_len = seq_len
        self.eos_id = store.eos_id
        self.vocab_size = store.vocab_size
        self.bytes_per_token = store.bytes_per_token
        kind = DocumentRows.of if documents == "doc" else StreamWindows
        self._windows: Windows = kind(store, seq_len)

    def __len__(self) -> int:
        """Number of whole windows."""
        return len(self._windows)

    def window(self, index: int) -> np.ndarray:
        """Tokens of one window, int64 [seq_len + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a set of {len(self)} windows")
        return self._windows.window(index)

    def real_targets(self, index: int) -> int:
        """Targets of one window that count."""
        return self._windows.real_targets(index)


def _open_for(prefix: str, seq_len: int, eos_id: int, vocab_size: int, documents: str) -> TokenStore:
    store = open_store(prefix, eos_id, vocab_size)
    too_short = too_short_for(store.tokens, seq_len, documents)
    if too_short:
        raise DataError(f"{prefix}.bin: {too_short[0]}; {too_short[1]} works")
    return store
