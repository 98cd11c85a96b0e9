"""Loss and gradients of one batch of a probe; on a GPU as CUDA graphs, one for every size.

The models of probes are small: their forward and backward pass is some thousand operations of some microseconds, and a
host cannot issue them as fast as a GPU does them. `parallel.compute.graphs` says what a graph is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.evaluate.probes.base import IGNORE
from hope.model import Model, next_token_loss


class Asked(NamedTuple):
    """A batch by what it asks: tokens [T, B]; which of its T B places are asked [N]; the answers there [N]; int64."""

    tokens_TB: Tensor
    places: Tensor
    answers: Tensor

    @property
    def size(self) -> tuple[torch.Size, int]:
        """What a recording depends on: sizes of one probe may ask more places of as many tokens."""
        return self.tokens_TB.shape, len(self.answers)


def asked(tokens_TB: Tensor, targets_TB: Tensor, device: torch.device) -> Asked:
    """A batch on a device; targets that are IGNORE are not asked."""
    targets = targets_TB.flatten()
    places = (targets != IGNORE).nonzero().squeeze(1)
    return Asked(*(part.to(device, non_blocking=True) for part in (tokens_TB, places, targets[places])))


class Passes:
    """Every call ADDS the gradients of its batch to those of the parameters, which are there (`flatten` makes them).

    Make it before the first pass of the model: work then goes to a stream that can be recorded. The first batch of a
    size is computed as it is, which compiles kernels. The second one is recorded, and replayed from then on.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device
        self._seen: set[tuple[torch.Size, int]] = set()
        self._graphs: dict[tuple[torch.Size, int], _Graph] = {}
        self._pool: Any = None
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def __call__(self, batch: Asked) -> Tensor:
        """The loss, a scalar."""
        graph = self._graphs.get(batch.size)
        if graph is None and self._device.type == "cuda" and batch.size in self._seen:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[batch.size] = _Graph(self._model, batch, self._pool)
        if graph is not None:
            return graph.replay(batch)
        self._seen.add(batch.size)
        return one_pass(self._model, batch)


def one_pass(model: Model, batch: Asked) -> Tensor:
    """Forward and backward: the mean loss over the places that are asked, whose gradients are added. Others are not
    scored."""
    x_TBD, _ = model.trunk(batch.tokens_TB, keep_state=False)
    logits_NV = model.vocabulary.logits(x_TBD.flatten(0, 1).index_select(0, batch.places))
    loss = next_token_loss(logits_NV.unsqueeze(0), batch.answers)
    loss.backward()
    return loss.detach()


class _Graph:
    """One recording, and the batch that it reads."""

    def __init__(self, model: Model, batch: Asked, pool: Any) -> None:
        self._batch = Asked(*(part.clone() for part in batch))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            self._loss = one_pass(model, self._batch)

    def replay(self, batch: Asked) -> Tensor:
        for mine, new in zip(self._batch, batch, strict=True):
            mine.copy_(new)
        self._graph.replay()
        return self._loss
