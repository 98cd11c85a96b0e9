"""Global batches cut for one data-parallel rank, as [time, batch] tensors.

Rows padded behind their document (`documents="doc"`) carry weights: 0 at padding and, elsewhere, places of the global
batch / real targets of the global batch. The mean of weight x loss over all places, averaged over equal micro-batches
and ranks, is then the mean over the real targets of the global batch, for every layout and without communication.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch

from data_prep.errors import DataError
from data_prep.training.index_rows import PAD
from data_prep.training.stages import split_windows
from hope.batch import Batch


class _Samples(Protocol):
    eos_id: int

    def sample(self, number: int) -> np.ndarray: ...

    def real_targets(self, number: int) -> int:
        """Asked only with documents="doc"."""


class _Windows(Protocol):
    eos_id: int

    def __len__(self) -> int: ...

    def window(self, index: int) -> np.ndarray: ...

    def real_targets(self, index: int) -> int: ...


def batch_of_windows(
    windows: Sequence[np.ndarray], documents: str, eos_id: int, real_weight: float = 1.0, counted: int | None = None
) -> Batch:
    """Stack windows (each int64 [T + 1]).

    `documents` is "carry" or "stream" (no starts), "reset" (starts) or "doc" (weights: `real_weight` at targets, 0 at
    PAD; PAD itself becomes `eos_id`, an id that every model has a row for). With `counted`, only the targets of so many
    leading windows count, `real_weight` each.
    """
    windows_TB = torch.from_numpy(np.stack(windows, axis=1))
    tokens_TB, targets_TB = windows_TB[:-1].contiguous(), windows_TB[1:].contiguous()
    starts_TB = weights_TB = None
    if documents == "reset":
        starts_TB = torch.ones_like(tokens_TB, dtype=torch.bool)
        starts_TB[1:] = tokens_TB[:-1] == eos_id
    elif documents == "doc":
        weights_TB = (targets_TB != PAD).float() * real_weight
        tokens_TB, targets_TB = (ids.masked_fill(ids == PAD, eos_id) for ids in (tokens_TB, targets_TB))
    if counted is not None:
        weights_TB = torch.full(targets_TB.shape, real_weight) if weights_TB is None else weights_TB
        weights_TB[:, counted:] = 0.0
    return Batch(tokens_TB, targets_TB, starts_TB, weights_TB)


def global_batch_slice(consumed: int, global_batch: int, dp_rank: int, dp_size: int) -> range:
    """Sample numbers of one rank: its contiguous share of consumed .. consumed + global_batch - 1."""
    share = global_batch // dp_size
    start = consumed + dp_rank * share
    return range(start, start + share)


class BatchLoader:
    """The micro-batches of a rank for any number of consumed samples; holds no position of its own.

    The union over ranks of what `batches(consumed)` gives is the same for every dp_size and micro_batch.
    The following global batch is read in one background thread; an error there is raised by the call
    that asks for that batch.
    """

    def __init__(
        self,
        dataset: _Samples,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        documents: str = "carry",
        prefetch: bool = True,
    ) -> None:
        """Sizes are in samples: global_batch over all ranks, micro_batch of one forward pass of one rank.

        Raises:
            DataError: global_batch is not a multiple of micro_batch * dp_size.
        """
        unit = micro_batch * dp_size
        if unit < 1 or global_batch < 1 or global_batch % unit:
            raise DataError(
                f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch}"
                f" * {dp_size} data-parallel ranks; {_nearest_multiples(global_batch, unit)} works"
            )
        self._dataset = dataset
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._documents = documents
        self._pin = torch.cuda.is_available()
        # a new thread would be on GPU 0, where pinning would start a context for every rank of the node
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if self._pin else None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=begin) if prefetch else None
        self._next: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def batches(self, consumed: int, row_tokens: int = 0) -> list[Batch]:
        """This rank's micro-batches (global_batch / dp_size / micro_batch of them), in order.

        `row_tokens` below the window's seq_len cuts every window into rows of that many tokens; 0: one row each.
        """
        held, self._next = self._next, None
        wanted = (consumed, row_tokens)
        result = held[1].result() if held and held[0] == wanted else self._read(*wanted)
        if self._executor is not None:
            following = (consumed + self._global_batch, row_tokens)
            self._next = following, self._executor.submit(self._read, *following)
        return result

    def close(self) -> None:
        """Stop the background thread."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor = self._next = None

    def _read(self, consumed: int, row_tokens: int) -> list[Batch]:
        numbers = global_batch_slice(consumed, self._global_batch, self._dp_rank, self._dp_size)
        windows = [self._dataset.sample(number) for number in numbers]
        real_weight = 1.0
        if self._documents == "doc":
            whole_batch = range(consumed, consumed + self._global_batch)
            real_weight = weight_of_real(self._dataset.real_targets, whole_batch, len(windows[0]) - 1)
        step = self._micro_batch
        rows_of = [split_windows(windows[start : start + step], row_tokens) for start in range(0, len(windows), step)]
        batches = [batch_of_windows(rows, self._documents, self._dataset.eos_id, real_weight) for rows in rows_of]
        return [batch.pinned() for batch in batches] if self._pin else batches


def weight_of_real(real_targets: Callable[[int], int], numbers: Sequence[int], seq_len: int) -> float:
    """Places of these samples / their real targets: what a target counts so that the mean weight is 1."""
    return len(numbers) * seq_len / sum(real_targets(number) for number in numbers)


def _nearest_multiples(value: int, unit: int) -> str:
    if unit < 1:
        return "1 or more of each"
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)


def heldout_batches(
    heldout: _Windows,
    windows: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    documents: str = "carry",
) -> Iterator[Batch]:
    """A rank's equal share of the first `windows` held-out windows, in micro-batches of one size.

    Where they do not divide evenly, the last one is repeated with weight 0 and the others' weights grow by as much:
    ranks do equal work, and the mean is that of these windows in every layout.

    Raises:
        DataError: the set has fewer windows.
    """
    if not 1 <= windows <= len(heldout):
        raise DataError(f"{windows} held-out windows of a set of {len(heldout)}; 1 to {len(heldout)} works")
    unit = micro_batch * dp_size
    places = -(-windows // unit) * unit
    numbers = global_batch_slice(0, places, dp_rank, dp_size)
    real_weight = places / windows
    if documents == "doc":
        real_weight *= weight_of_real(heldout.real_targets, range(windows), len(heldout.window(0)) - 1)
    for start in range(0, len(numbers), micro_batch):
        chosen = numbers[start : start + micro_batch]
        rows = [heldout.window(min(number, windows - 1)) for number in chosen]
        counted = None if places == windows else max(0, min(micro_batch, windows - chosen[0]))
        yield batch_of_windows(rows, documents, heldout.eos_id, real_weight, counted)
