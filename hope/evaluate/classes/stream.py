"""Classes as a stream of tasks, and examples as rows of token ids. All of it is a pure function of the seed.

A prompt is the text, a line feed, and the class's name; behind it stands the end-of-document token. That end is a part
of the answer: without it `calendar` would always be at least as probable as `calendar update`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hope.evaluate.classes.data import Example, shown
from hope.evaluate.errors import EvaluationError
from hope.evaluate.probes.base import IGNORE
from hope.evaluate.rows import Row
from hope.evaluate.tasks import Encode, pair_row

_CLASSES, _EXAMPLES = 0, 1
"""What a generator is for."""


def order_of(labels: Sequence[str], tasks: int, seed: int, classes: int | None = None) -> list[list[str]]:
    """The classes of each task: `labels` in an order drawn by `seed`, in `tasks` parts, earlier ones larger by at most
    one.

    Args:
        classes: that many at most, the first ones of the order.

    Raises:
        EvaluationError: fewer classes than tasks, or than `classes`.
    """
    if classes is not None and classes > len(labels):
        raise EvaluationError(f"--classes {classes}: the data has {len(labels)}")
    known = sorted(labels)
    drawn = np.random.default_rng([seed, _CLASSES]).permutation(len(known))[:classes]
    if tasks > len(drawn):
        raise EvaluationError(f"--tasks {tasks}: there are {len(drawn)} classes; --tasks {len(drawn)} is the most")
    return [[known[index] for index in part] for part in np.array_split(drawn, tasks)]


class Prompts:
    """Rows of prompts.

    Args:
        encode: of the tokenizer.
        eos_id: stands before and after a prompt.
        window: inputs at most; the text is cut from the left.
    """

    def __init__(self, encode: Encode, eos_id: int, window: int) -> None:
        self._encode, self._eos_id, self._window = encode, eos_id, window

    def row(self, text: str, label: str) -> Row:
        """The row of which the class's name and the end count."""
        row = pair_row(self._encode, f"{text}\n", shown(label), self._eos_id, self._window - 1)
        return Row(np.append(row.ids, np.int64(self._eos_id)), row.first)


def batches(
    examples: Sequence[Example], prompts: Prompts, size: int, epochs: int, seed: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, int64 [T, B], of `epochs` passes, each in an order of its own drawn by `seed`.

    What stands before the class's name, and padding, is no target (`IGNORE`). The last batch of a pass may be smaller.
    """
    rows = [prompts.row(*example) for example in examples]
    for epoch in range(epochs):
        order = np.random.default_rng([*seed, _EXAMPLES, epoch]).permutation(len(rows)).tolist()
        for begin in range(0, len(order), size):
            yield batch_of([rows[index] for index in order[begin : begin + size]])


def batch_of(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [T, B]; shorter rows are padded behind their last token."""
    longest = max(len(row.ids) for row in rows) - 1
    tokens_TB = torch.zeros(longest, len(rows), dtype=torch.int64)
    targets_TB = torch.full((longest, len(rows)), IGNORE, dtype=torch.int64)
    for column, row in enumerate(rows):
        ids = torch.from_numpy(np.asarray(row.ids, np.int64))
        tokens_TB[: len(ids) - 1, column] = ids[:-1]
        targets_TB[row.first : len(ids) - 1, column] = ids[row.first + 1 :]
    return tokens_TB, targets_TB
