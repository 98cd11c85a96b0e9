"""What lm-evaluation-harness asks of a model, answered by our own scorer.

`Answers` has the three methods of the harness's class `LM` (lm_eval/api/model.py of version 0.4) and does not import
it: `python -m hope.evaluate.harness` puts the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from hope.evaluate.record import Record
from hope.evaluate.rows import ListedRows, Values
from hope.evaluate.run import Engine, score
from hope.evaluate.tasks import Encode, pair_row, reduce_pair
from hope.evaluate.texts import Text, Windows

Generate = Callable[[str, Sequence[str], int], str]
"""(prompt, stop strings, tokens at most) -> what greedy decoding adds, up to the first stop string."""
TOKENS = 256  # of an answer, where a task does not say


class Request(Protocol):
    """The harness's `Instance`, as far as it is read here."""

    @property
    def args(self) -> tuple[Any, ...]:
        """(context, continuation), (text,), or (context, generation options)."""


class Answers:
    """Log-probabilities as `python -m hope.evaluate` has them, from the same rows in the same batches.

    Args:
        encode: token ids of a text.
        window: tokens of a window; contexts are cut from the left. None: none is cut, the state is carried.
        generate: for tasks that generate; None: these are refused.
    """

    def __init__(
        self, engine: Engine, encode: Encode, eos_id: int, window: int | None, generate: Generate | None = None
    ) -> None:
        super().__init__()
        self._engine, self._encode, self._eos_id, self._window = engine, encode, eos_id, window
        self._generate = generate

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it), one for each request."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        rows = [pair_row(self._encode, *pair, self._eos_id, self._window) for pair in pairs]
        found = self._score(ListedRows(rows), reduce_pair)
        return [(-found[index][0], bool(found[index][1])) for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-probability of each text, its first token given the end-of-document token; windows do not overlap."""
        ids = [self._encode(request.args[0]) for request in requests]
        tokens = np.fromiter(chain.from_iterable(ids), np.int64)
        bounds = np.cumsum([0, *map(len, ids)])
        windows = Windows(Text(lambda a, b: tokens[a:b], bounds, self._eos_id, lambda count: None), self._window)
        found = self._score(windows, lambda index, nats, best: [float(nats.sum())])
        sums = np.zeros(len(ids))
        for index in range(len(windows)):
            sums[np.searchsorted(bounds, windows.begins[index], side="right") - 1] -= found[index][0]
        return [float(value) for value in sums]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Greedy continuations. Raises NotImplementedError if this was made without a way to generate."""
        if self._generate is None:
            raise NotImplementedError("tasks that generate text need a generator, and none was given")
        return [self._generate(request.args[0], *_until(request.args[1])) for request in requests]

    def _score(self, rows: Any, reduce: Callable[[int, np.ndarray, np.ndarray], Values]) -> Mapping[int, Values]:
        return score(self._engine, rows, reduce, Record(None, {}, {}).open("", {}, None))


def _until(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """Stop strings and the number of tokens that a request asks for."""
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until), int(options.get("max_gen_toks", TOKENS))
