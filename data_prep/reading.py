"""The training side: windows of tokens by sample number, and held-out windows in file order."""

import hashlib

import numpy as np

from data_prep.batches import Batch, BatchLoader, global_batch_slice, heldout_batches
from data_prep.errors import DataError
from data_prep.indexed import Header, memmap_tokens
from data_prep.manifest import Manifest, open_checked
from data_prep.order import EpochOrder
from data_prep.window_index import agree, build_window_dataset

__all__ = ["Batch", "BatchLoader", "HeldoutSet", "TrainingSet", "global_batch_slice", "heldout_batches"]


class TrainingSet:
    """Windows of seq_len + 1 tokens; which window a sample is depends on (seed, sample number) alone.

    Every epoch visits every window once, in an order of its own; no number of steps enters, so extending
    a run never reshuffles. Windows overlap by one token (the last target is the next first input).

    Attributes: seq_len, seed, eos_id, vocab_size, fingerprint_of_data (hex; belongs in checkpoints).
    """

    def __init__(self, prefix: str, seq_len: int, seed: int, cache_dir: str = "") -> None:
        """Check the files and build or load the index; with torch.distributed, every rank must call this.

        Raises:
            DataError: on every rank, if the set is missing, truncated, empty or shorter than one window.
        """
        error = ""
        try:
            _, manifest = _open_for(prefix, seq_len)
        except DataError as problem:
            error = str(problem)
        agree(error)
        self.seq_len = seq_len
        self.seed = seed
        self.eos_id = manifest.eos_id
        self.vocab_size = manifest.vocab_size
        self.fingerprint_of_data = manifest.fingerprint
        self._windows = build_window_dataset(prefix, manifest, seq_len, seed, cache_dir)
        self._order = EpochOrder(len(self), seed, 0)

    def __len__(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    def window(self, index: int) -> np.ndarray:
        """Tokens of one window, int64 [seq_len + 1]: inputs are [:-1], targets [1:]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside an epoch of {len(self)} windows")
        item = self._windows[index]
        return np.append(item["tokens"].numpy(), item["labels"][-1].item())

    def sample(self, number: int) -> np.ndarray:
        """The window that sample `number` of the whole run is (counted from 0 over all epochs)."""
        epoch, position = divmod(number, len(self))
        order = self._order
        if epoch != order.epoch:
            order = self._order = EpochOrder(len(self), self.seed, epoch)
        return self.window(order[position])

    def fingerprint(self, consumed: int, global_batch: int) -> str:
        """Hex sha256 of the token ids of samples consumed .. consumed + global_batch - 1.

        The same on every rank and for every layout.
        """
        digest = hashlib.sha256()
        for number in range(consumed, consumed + global_batch):
            digest.update(self.sample(number).astype("<i8").tobytes())
        return digest.hexdigest()


class HeldoutSet:
    """Windows in file order, never shuffled: window k is tokens[k * seq_len : k * seq_len + seq_len + 1]."""

    def __init__(self, prefix: str, seq_len: int) -> None:
        """Check and open the files; raises DataError as TrainingSet does, but is not collective."""
        header, manifest = _open_for(prefix, seq_len)
        self.seq_len = seq_len
        self.eos_id = manifest.eos_id
        self.vocab_size = manifest.vocab_size
        self.bytes_per_token = manifest.bytes_per_token
        self._tokens = memmap_tokens(prefix, header)

    def __len__(self) -> int:
        """Number of whole windows."""
        return (len(self._tokens) - 1) // self.seq_len

    def window(self, index: int) -> np.ndarray:
        """Tokens of one window, int64 [seq_len + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside a set of {len(self)} windows")
        start = index * self.seq_len
        return self._tokens[start : start + self.seq_len + 1].astype(np.int64)


def _open_for(prefix: str, seq_len: int) -> tuple[Header, Manifest]:
    header, manifest = open_checked(prefix)
    if manifest.tokens < seq_len + 1:
        raise DataError(
            f"{prefix}.bin: {manifest.tokens} tokens are fewer than one window of seq_len {seq_len} + 1;"
            f" train.seq_len at most {manifest.tokens - 1} works"
        )
    return header, manifest
