"""Held-out loss, with whoever runs the batches and averages over ranks passed in."""

from collections.abc import Callable, Iterable

import torch

from hope.batch import Batch


def heldout_loss(
    batches: Iterable[Batch],
    forward: Callable[[Batch], dict[str, torch.Tensor]],
    average: Callable[[torch.Tensor], torch.Tensor],
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean next-token loss in nats over equally large batches, None if `stopped` before the last.

    Args:
        batches: this rank's share; every rank has as many batches of one size.
        forward: runs one batch without gradients and reports {"loss": scalar}.
        average: mean over the data-parallel ranks.
        stopped: asked before every batch; the same answer on every rank. A preempted run has no time to finish this.

    Raises:
        ValueError: there are no batches.
    """
    losses = []
    for batch in batches:
        if stopped():
            return None
        losses.append(forward(batch)["loss"])
    if not losses:
        raise ValueError("no held-out batches to evaluate on")
    return average(torch.stack(losses).mean()).item()
