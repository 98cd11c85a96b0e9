"""Held-out losses on the layout that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hope.batch import Batch
from hope.train.evaluate import heldout_loss
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica
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
