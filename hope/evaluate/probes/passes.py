"""Loss and gradients of one batch of a probe; on a GPU as CUDA graphs, one for every size.

The models of probes are small: their forward and backward pass is some thousand operations of some microseconds, and a
host cannot issue them as fast as a GPU does them. `parallel.compute.graphs` says what a graph is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hope.evaluate.probes.base import IGNORE
from hope.model import Model, next_token_loss


class Passes:
    """Every call leaves the gradients of its batch in the parameters, and nothing of the batches before.

    Make it before the first pass of the model: work then goes to a stream that can be recorded. The first batch of a
    size is computed as it is, which compiles kernels. The second one is recorded, and replayed from then on.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device
        self._seen: set[torch.Size] = set()
        self._graphs: dict[torch.Size, _Graph] = {}
        self._pool: Any = None
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def __call__(self, tokens_TB: Tensor, targets_TB: Tensor) -> Tensor:
        """The loss, a scalar; targets that are IGNORE do not count. Both int64 [T, B], on any device."""
        size = tokens_TB.shape
        graph = self._graphs.get(size)
        if graph is None and self._device.type == "cuda" and size in self._seen:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = self._graphs[size] = _Graph(self._model, tokens_TB, targets_TB, self._device, self._pool)
        if graph is not None:
            return graph.replay(tokens_TB, targets_TB)
        self._seen.add(size)
        return one_pass(self._model, tokens_TB.to(self._device), targets_TB.to(self._device))


def one_pass(model: Model, tokens_TB: Tensor, targets_TB: Tensor) -> Tensor:
    """Forward and backward: the mean loss over the targets that count, and its gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    asked = targets_TB != IGNORE
    weights_TB = asked.float() * (asked.numel() / asked.sum())
    logits_TBV, _ = model(tokens_TB, keep_state=False)
    loss = next_token_loss(logits_TBV, targets_TB.clamp(min=0), weights_TB)
    loss.backward()
    return loss.detach()


class _Graph:
    """One recording, with the batch that it reads and the gradients that it writes."""

    def __init__(self, model: Model, tokens_TB: Tensor, targets_TB: Tensor, device: torch.device, pool: Any) -> None:
        self._batch = tokens_TB.to(device), targets_TB.to(device)
        self._parameters: list[nn.Parameter] = list(model.parameters())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            self._loss = one_pass(model, *self._batch)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def replay(self, *batch: Tensor) -> Tensor:
        for mine, new in zip(self._batch, batch, strict=True):
            mine.copy_(new)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss
