"""Rows of token ids, scored in batches of similar length. How they are batched does not change a score but by rounding.

A row's shorter neighbours are padded behind their last token. Every model here is causal, so what stands behind a
token does not change its score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hope.evaluate.scorer import Scorer

T = TypeVar("T")
Values = list[float]
"""What is kept of a row: sums and counts, as its owner defines them."""


class Row(NamedTuple):
    """ids: int64 [n + 1], of which the last n are targets; first: the first target (from 0) that counts."""

    ids: np.ndarray
    first: int


class Rows(Protocol):
    """Rows that may be read from a file when they are asked for.

    Attributes: lengths, int64 [rows], the number of targets of each.
    """

    lengths: np.ndarray

    def __getitem__(self, index: int) -> Row: ...


class ListedRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.lengths = np.array([len(row.ids) - 1 for row in rows], np.int64)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class Share(Protocol):
    """This process's share of the batches, and how results come together."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def exchange(self, results: dict[int, Values]) -> dict[int, Values]:
        """The results of all processes, on every one of them. Collective."""

    def agree(self, value: T) -> T:
        """What the first process says. Collective."""


@dataclass(frozen=True)
class Alone:
    """One process has all batches."""

    rank: int = 0
    size: int = 1

    def exchange(self, results: dict[int, Values]) -> dict[int, Values]:
        """The same."""
        return results

    def agree(self, value: T) -> T:
        """The same."""
        return value


def batches_of(lengths: np.ndarray, batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, as many in a batch as have `batch_tokens` places, padding included; at least one.

    A pure function of the lengths: a run that is resumed has the same batches, and so the same rounding.
    """
    batches: list[list[int]] = []
    room = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if not batches or room < lengths[batches[-1][0]]:
            batches.append([])
            room = max(batch_tokens, int(lengths[index]))
        batches[-1].append(index)
        room -= int(lengths[batches[-1][0]])
    return batches


def score_rows(
    rows: Rows,
    scorer: Scorer,
    reduce: Callable[[int, np.ndarray, np.ndarray], Values],
    *,
    batch_tokens: int,
    done: Collection[int] = (),
    share: Share,
) -> Iterator[Mapping[int, Values]]:
    """Score every row once; yields what a round of batches, one per process, has found. Collective.

    Args:
        reduce: (row number, nats, best) of the targets that count -> what is kept; float64 and bool arrays.
        batch_tokens: places of a batch, and the tokens after which a longer row is cut, its state being carried.
        done: row numbers to pass over.
    """
    known = frozenset(done)
    wanted = [batch for batch in batches_of(rows.lengths, batch_tokens) if not known.issuperset(batch)]
    for begin in range(0, len(wanted), share.size):
        mine = wanted[begin : begin + share.size][share.rank : share.rank + 1]
        found: dict[int, Values] = {}
        for batch in mine:
            for index, nats, best in _score_batch(rows, batch, scorer, batch_tokens):
                found[index] = reduce(index, nats, best)
        yield share.exchange(found)


def _score_batch(
    rows: Rows, batch: list[int], scorer: Scorer, batch_tokens: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    chosen = [rows[index] for index in batch]
    longest = max(len(row.ids) for row in chosen)
    ids_TB = torch.zeros(longest, len(chosen), dtype=torch.int64)
    for column, row in enumerate(chosen):
        ids_TB[: len(row.ids), column] = torch.from_numpy(np.asarray(row.ids, np.int64))
    nats_TB, best_TB = score_cut(scorer, ids_TB, max(1, batch_tokens // len(chosen)))
    for column, (index, row) in enumerate(zip(batch, chosen, strict=True)):
        counted = slice(row.first, len(row.ids) - 1)
        yield index, nats_TB[counted, column].double().numpy(), best_TB[counted, column].numpy()


def score_cut(scorer: Scorer, ids_TB: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """(nats, best) [T, B] of ids [T + 1, B], in calls of at most `cut` tokens, each with the state of the one before.

    One call equals any cutting, for every mixer, up to rounding.
    """
    length = ids_TB.shape[0] - 1
    nats, best, state = [], [], None
    for begin in range(0, length, cut):
        end = min(begin + cut, length)
        scores = scorer(ids_TB[begin:end], ids_TB[begin + 1 : end + 1], state, end < length)
        nats.append(scores.nats_TB)
        best.append(scores.best_TB)
        state = scores.state
    return torch.cat(nats), torch.cat(best)
