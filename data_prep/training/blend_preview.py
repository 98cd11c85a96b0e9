"""What a run would read: `python -m data_prep blend`."""

from collections.abc import Iterator

import numpy as np

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.training.blend_order import BlendOrder
from data_prep.training.index_build import open_source
from data_prep.training.index_rows import DocumentRows, StreamWindows, Windows
from data_prep.training.index_store import TokenStore
from data_prep.training.order import EpochOrder

FIRST = 24


def preview(data: DataConfig, seq_len: int, tokens: int) -> Iterator[str]:
    """What a run of `tokens` training tokens reads: per source samples, tokens, epochs, and what comes first.

    Needs no index and changes no file. Raises DataError if a source is missing or damaged.
    """
    sources = [source for _, source in data.entries()]
    stores = [open_source(source.train, source, f"{path}.train") for path, source in data.entries()]
    windows = [_windows(store, seq_len, data.documents) for store in stores]
    order = BlendOrder([source.weight for source in sources])
    samples = -(-tokens // seq_len)
    counts = order.counts(samples)
    names = [source.name or "train" for source in sources]
    yield f"{samples:,} samples of {seq_len} tokens; documents {data.documents}, seed {data.seed}"
    yield _row("source", "share", "tokens in set", "windows/epoch", "samples read", "tokens read", "epochs")
    for name, share, store, source_windows, count in zip(names, order.shares, stores, windows, counts, strict=True):
        per_epoch = len(source_windows)
        read = round(count * _filled(source_windows) * seq_len)
        figures = (f"{figure:,}" for figure in (store.tokens, per_epoch, count, read))
        yield _row(name, f"{share:.2%}", *figures, f"{count / per_epoch:.3f}")
    if len(names) > 1:
        first = [order.locate(number)[0] for number in range(min(FIRST, samples))]
        yield f"first {len(first)} samples come from: {' '.join(names[source] for source in first)}"
    for name, source, source_windows in zip(names, sources, windows, strict=True):
        permutation = EpochOrder(len(source_windows), data.seed, 0, source.name)
        numbers = " ".join(str(permutation[i]) for i in range(min(8, len(source_windows))))
        yield f"first windows of {name}: {numbers}"


def _windows(store: TokenStore, seq_len: int, documents: str) -> Windows:
    """The windows in file order: as many as training has."""
    windows = DocumentRows.of(store, seq_len) if documents == "doc" else StreamWindows(store, seq_len)
    if len(windows) == 0:
        raise DataError(f"{store.name}: {store.tokens} tokens give no window of train.seq_len {seq_len}")
    return windows


def _filled(windows: Windows) -> float:
    """Targets that are tokens / all places; below 1 where rows of one document are padded."""
    if not isinstance(windows, DocumentRows):
        return 1.0
    targets = np.maximum(np.diff(windows.bounds) - 1, 0).sum()
    return float(targets / (len(windows) * windows.seq_len))


def _row(name: str, *cells: str) -> str:
    return f"{name:<16}" + "".join(f"{cell:>17}" for cell in cells)
