"""A text whose tokens are scored in order by a model that learns from each window once it is scored."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hope.adapt.learner import Learner, detached
from hope.evaluate.rows import Rows, Values
from hope.evaluate.scorer import ModelScorer


def score_stream(
    rows: Rows,
    scorer: ModelScorer,
    learner: Learner,
    reduce: Callable[[int, np.ndarray, np.ndarray], Values],
    say: Callable[[int, int, float], object],
) -> dict[int, Values]:
    """The values of all rows, one after the other. Each has a state of its own; what the levels learn goes on.

    Args:
        scorer: of the model whose levels `learner` has.
        reduce: as `hope.evaluate.rows.score_rows` has it.
        say: told how many rows are scored, of how many, and the seconds since the first.
    """
    count, began, found = len(rows.lengths), time.monotonic(), {}
    say(0, count, 0.0)
    for index in range(count):
        row = rows[index]
        nats, best = score_and_learn(scorer, learner, torch.from_numpy(np.asarray(row.ids, np.int64)))
        found[index] = reduce(index, nats[row.first :].double().numpy(), best[row.first :].numpy())
        say(index + 1, count, time.monotonic() - began)
    return found


def score_and_learn(scorer: ModelScorer, learner: Learner, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(nats, best) [T] of ids [T + 1], in calls that end where a window of the learner does."""
    length, begin = len(ids) - 1, 0
    nats, best, state = [], [], None
    while begin < length:
        end = min(begin + learner.room, length)
        with torch.enable_grad():
            scores = scorer.scores(ids[begin:end, None], ids[begin + 1 : end + 1, None], state, True)
            learner.learn(scores.nats_TB.sum(), end - begin)
        nats.append(scores.nats_TB.detach()[:, 0])
        best.append(scores.best_TB[:, 0])
        state, begin = (detached(scores.state[0]), scores.state[1]), end
    return torch.cat(nats), torch.cat(best)


def adapted(learner: Learner) -> dict[str, Any]:
    """What a result says of it: which levels learned, how, how many weights these are, and their updates."""
    settings = learner.settings
    return {
        "updates": sum(learner.updates.values()),
        "adapted": {
            "levels": settings.names,
            "rate": settings.rate,
            "every": settings.every,
            "weights": learner.parameters,
            "updates": learner.updates,
        },
    }
