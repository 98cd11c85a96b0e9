"""What a run would read: `python -m data_prep blend`, and the dry run's part of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import DataError
from data_prep.training.blend_order import BlendOrder
from data_prep.training.index_build import open_source
from data_prep.training.index_rows import DocumentRows, StreamWindows, Windows
from data_prep.training.index_store import TokenStore
from data_prep.training.order import EpochOrder
from data_prep.training.phase_order import SampleOrder

FIRST = 24


@dataclass(frozen=True)
class Reading:
    """What a run reads of one source: `count` samples of its `windows` per epoch, `share` of all samples."""

    source: SourceConfig
    store: TokenStore
    windows: Windows
    share: float
    count: int

    @property
    def name(self) -> str:
        """As metrics and checkpoints call it."""
        return self.source.name or "train"

    @property
    def epochs(self) -> float:
        """How often the run goes through it."""
        return self.count / len(self.windows)


def readings(data: DataConfig, seq_len: int, samples: int, order: SampleOrder | None = None) -> list[Reading]:
    """What the first `samples` samples of a run read of every source, in `order`; None: blended by weight.

    Needs no index and changes no file. Raises DataError if a source is missing or damaged.
    """
    entries = data.entries()
    order = order or BlendOrder([source.weight for _, source in entries])
    stores = [open_source(source.train, source, f"{path}.train") for path, source in entries]
    windows = [_windows(store, seq_len, data.documents) for store in stores]
    sources = [source for _, source in entries]
    return list(map(Reading, sources, stores, windows, order.shares, order.counts(samples)))


def preview(data: DataConfig, seq_len: int, tokens: int) -> Iterator[str]:
    """What a run of `tokens` training tokens reads: per source samples, tokens, epochs, and what comes first.

    Needs no index and changes no file. Raises DataError if a source is missing or damaged.
    """
    samples = -(-tokens // seq_len)
    parts = readings(data, seq_len, samples)
    order = BlendOrder([part.source.weight for part in parts])
    yield f"{samples:,} samples of {seq_len} tokens; documents {data.documents}, seed {data.seed}"
    yield _row("source", "share", "tokens in set", "windows/epoch", "samples read", "tokens read", "epochs")
    for part in parts:
        read = round(part.count * _filled(part.windows) * seq_len)
        figures = (f"{figure:,}" for figure in (part.store.tokens, len(part.windows), part.count, read))
        yield _row(part.name, f"{part.share:.2%}", *figures, f"{part.epochs:.3f}")
    if len(parts) > 1:
        first = [order.locate(number)[0] for number in range(min(FIRST, samples))]
        yield f"first {len(first)} samples come from: {' '.join(parts[source].name for source in first)}"
    if data.documents == "stream":
        begins = EpochOrder(len(parts[0].windows), data.seed, 0, parts[0].source.name)[0]
        yield f"windows in file order, in a lane for each of train.global_batch; the first begins at window {begins}"
        return
    for part in parts:
        permutation = EpochOrder(len(part.windows), data.seed, 0, part.source.name)
        numbers = " ".join(str(permutation[i]) for i in range(min(8, len(part.windows))))
        yield f"first windows of {part.name}: {numbers}"


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
