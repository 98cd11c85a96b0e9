"""Held-out losses, and tasks, on the layout that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from hope.batch import Batch
from hope.cms import without_level
from hope.evaluate.rows import Rows, Values, score_rows
from hope.evaluate.scorer import ModelScorer
from hope.evaluate.tasks import Task, reduce_pair, result_of
from hope.train.evaluate import heldout_loss
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica
from parallel.compute.shares import RankShare
from parallel.start import groups


def heldout_losses(
    replica: Replica,
    sets: Iterable[tuple[str, Iterable[Batch]]],
    beat: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Mean next-token loss in nats of every (name, batches), the same on every rank. Collective.

    `beat` is called before every batch. None if a rank was asked to stop: a preempted run has no time to finish this.
    """
    ranks = replica.ranks
    copies = ranks.pp_size if ranks.vp_size > 1 else 1  # the interleaved schedule wants a multiple of its stages

    def forward(batch: Batch) -> dict[str, torch.Tensor]:
        beat("evaluate")
        reports = replica.run([batch.to(ranks.device)] * copies, forward_only=True)
        return {"loss": mean_loss(reports, ranks.device)}

    losses = {}
    for name, batches in sets:
        average = lambda loss: groups.loss_on_all_ranks(loss, ranks)
        loss = heldout_loss(batches, forward, average, lambda: groups.any_rank(stop_requested()))
        if loss is None:
            return None
        losses[name] = loss
    return losses


class Opened(Protocol):
    """A task and its pairs as token ids; `data_prep.texts.OpenTask` is one."""

    @property
    def task(self) -> Task:
        """Its items."""

    @property
    def rows(self) -> Rows:
        """A row for every pair."""

    @property
    def eos_id(self) -> int:
        """What ends documents."""


def task_scores(
    replica: Replica,
    tasks: Mapping[str, Opened],
    documents: str,
    batch_tokens: int,
    beat: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> dict[str, float]:
    """task.NAME.MEASURE of every task, the same on every rank; nothing if a rank was asked to stop. Collective.

    Every rank has the whole model. `documents`: "reset" starts anew after a document's end, as in training.
    """
    scores: dict[str, float] = {}
    if not tasks:
        return scores
    (model,), ranks = replica.models, replica.ranks
    training, dtype = model.training, next(model.parameters()).dtype
    for name, opened in tasks.items():
        starts_after = opened.eos_id if documents == "reset" else None
        scorer = ModelScorer(model, device=ranks.device, dtype=dtype, starts_after=starts_after)
        values: dict[int, Values] = {}
        share = RankShare(ranks)
        for found in score_rows(opened.rows, scorer, reduce_pair, batch_tokens=batch_tokens, share=share):
            values.update(found)
            beat("evaluate")
            if groups.any_rank(stop_requested()):
                model.train(training)
                return {}
        measures = result_of(opened.task, values)
        scores |= {f"task.{name}.{key}": part["value"] for key, part in measures.items() if isinstance(part, dict)}
    model.train(training)
    return scores


def without_levels(
    models: Sequence[nn.Module],
    levels: int,
    take: Callable[[], dict[str, float] | None],
    summary: Callable[[dict[str, float]], dict[str, float]],
) -> dict[str, float]:
    """`heldout_loss_without.cmsN`: the held-out loss with one of the first `levels` CMS levels switched off at a time.

    `take` evaluates, as `heldout_losses` does; `summary` makes metrics of the sources' losses. Collective.
    """
    found = {}
    for number in range(levels):
        with without_level(models, number):
            losses = take()
        if losses is None:
            break
        found[f"heldout_loss_without.cms{number}"] = summary(losses)["heldout_loss"]
    return found
