"""A source from its rows to its result, with progress, and passing over what an earlier run has scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hope.adapt.learner import Learner
from hope.evaluate.record import Source
from hope.evaluate.rows import ListedRows, Rows, Share, Values, score_rows
from hope.evaluate.scorer import ModelScorer, Scorer
from hope.evaluate.stream import adapted, score_stream
from hope.evaluate.tasks import Encode, Task, reduce_pair, result_of, rows_of
from hope.evaluate.texts import Text, TextSums, Windows


@dataclass(frozen=True)
class Engine:
    """What scores, and how.

    Attributes:
        scorer: the model.
        share: this process's part of the work.
        batch_tokens: places of a batch.
        say: told how many rows are scored, of how many, and the seconds since the first.
    """

    scorer: Scorer
    share: Share
    batch_tokens: int
    say: Callable[[int, int, float], object] = lambda done, total, seconds: None


def evaluate_text(
    engine: Engine,
    text: Text,
    source: Source,
    *,
    window: int | None,
    stride: int | None,
    block: int,
    limit: int | None = None,
    learner: Learner | None = None,
) -> dict[str, Any]:
    """Measures of a text; see `Windows` for `window` and `stride`. Collective.

    Args:
        block: targets of a cluster of the standard error.
        limit: windows at most; bytes are then those of the tokens that count, and words are not defined.
        learner: what learns from the text while it is scored, in order and by one process, whose scorer is a
            `ModelScorer`. Nothing is kept of a text that is not finished. None: the weights stay as they are.
    """
    if (known := engine.share.agree(source.result)) is not None:
        return known
    windows = Windows(text, window, stride)
    count = len(windows) if limit is None else min(limit, len(windows))
    sums = TextSums(windows, block)
    if learner is None:
        values = score(engine, windows.first(count), sums.reduce, source)
    else:
        assert isinstance(engine.scorer, ModelScorer)
        values = score_stream(windows.first(count), engine.scorer, learner, sums.reduce, engine.say)
    scored = sum(windows.counted(index) for index in range(count))
    whole = scored == text.tokens
    result = {"rows": count, **sums.result(values, text.bytes_of(scored), text.words if whole else None)}
    result |= {} if learner is None else adapted(learner)
    source.finish(result, keep_rows=False)
    return result


def evaluate_task(
    engine: Engine, task: Task, source: Source, encode: Encode, *, eos_id: int, window: int | None
) -> dict[str, Any]:
    """Measures of a task; see `hope.evaluate.tasks.pair_row` for `window`. Collective."""
    if (known := engine.share.agree(source.result)) is not None:
        return known
    rows = rows_of(task, encode, eos_id, window)
    result = result_of(task, score(engine, ListedRows(rows), reduce_pair, source))
    source.finish(result, keep_rows=True)
    return result


def score(
    engine: Engine, rows: Rows, reduce: Callable[[int, np.ndarray, np.ndarray], Values], source: Source
) -> Mapping[int, Values]:
    """The values of all rows, `source` keeping them. Collective."""
    count, began = len(rows.lengths), time.monotonic()
    known = engine.share.agree({index: value for index, value in source.values.items() if index < count})
    done = dict(known)
    engine.say(len(done), count, 0.0)
    batches = score_rows(
        rows, engine.scorer, reduce, batch_tokens=engine.batch_tokens, done=frozenset(known), share=engine.share
    )
    for found in batches:
        done.update(found)
        source.add(found)
        engine.say(len(done), count, time.monotonic() - began)
    return done
