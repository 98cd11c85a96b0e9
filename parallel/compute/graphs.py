"""Forward and backward pass of a micro-batch as one CUDA graph: the host starts it with one call.

A host issues the operations of a step one by one, some 600 per HOPE layer, and a small model's GPU waits for it. A
graph is recorded once and replayed with new numbers in the same memory. Parameters stay where they are, and so do the
tensors of a batch and the fp32 sums to which a backward pass in bf16 adds its gradients. A replay is therefore the pass
that was recorded, operation by operation.

What must be new in every pass cannot be in a graph: shapes that depend on marks of documents, sends between pipeline
stages. `train.cuda_graphs` is refused with these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hope.batch import Batch
from hope.devices import require_graphs
from hope.model import Model
from parallel.compute.pipeline import Report, StepFn

Key = tuple[bool, int, tuple[tuple[int, ...] | None, ...]]


def graphs_for(wanted: bool, step_fn: StepFn, device: torch.device) -> Graphs | None:
    """Those of `train.cuda_graphs` on a device; None if they are not wanted.

    Call it before the model is built. This thread's work then goes to a stream that can be recorded, which the default
    one cannot, and the backward pass adds up a gradient on the stream on which its parameter was prepared.

    Raises:
        CannotCapture: this device has none.
    """
    require_graphs(wanted, device.type)
    if not wanted:
        return None
    torch.cuda.set_stream(torch.cuda.Stream(device))
    return Graphs(step_fn, device)


class Graphs:
    """The passes of a model that is whole on its pipeline rank.

    The first step with new shapes, or with mixers watched for the first time, is made as it is: it compiles kernels and
    makes the libraries' workspaces. The next one records. There is one graph for steps that the log watches and one for
    the others. They share their memory, since one is never in use while the other runs.

    Args:
        step_fn: as `parallel.compute.pipeline.forward_backward` takes it, of a stage with a loss.
    """

    def __init__(self, step_fn: StepFn, device: torch.device) -> None:
        self._step_fn, self._device = step_fn, device
        self._seen: set[Key] = set()
        self._graphs: dict[bool, _Graph] = {}
        self._pool: Any = None

    def run(
        self,
        model: Model,
        batches: Sequence[Batch],
        as_they_are: Callable[[], list[Report]],
        phase: Callable[[str], object] | None = None,
    ) -> list[Report]:
        """Gradients are ADDED as the mean over these micro-batches; a report for each.

        as_they_are: the same without a graph.
        """
        key = _key(model, batches)
        if key is None or key not in self._seen:
            self.close()  # else memory would be held twice
            if key is not None:
                self._seen.add(key)
            return as_they_are()
        if phase is not None:
            phase("forward")
        reports = []
        for batch in batches:
            graph = self._graphs.get(key[0])
            if graph is None or graph.key != key:
                graph = self._record(key, model, batch)
            reports.append(graph.replay(batch))
        return reports

    def _record(self, key: Key, model: Model, batch: Batch) -> _Graph:
        self._graphs.pop(key[0], None)
        if not self._graphs:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # what the passes before took is now the graph's
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs[key[0]] = graph = _Graph(key, batch, self._pool, lambda b: self._pass(model, b, key[1]))
        return graph

    def _pass(self, model: Model, batch: Batch, count: int) -> Report:
        """Forward and backward of one micro-batch out of `count`."""
        loss, report = self._step_fn(model, None, batch)
        (loss / count).backward()
        return {name: value.detach() for name, value in report.items()}

    def close(self) -> None:
        """Forget what was recorded, and give its memory back."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()
            torch.cuda.empty_cache()


class _Graph:
    """One recording: the tensors that it reads and writes, and how to run it again."""

    def __init__(self, key: Key, batch: Batch, pool: Any, one_pass: Callable[[Batch], Report]) -> None:
        self.key = key
        self._batch = Batch(*(None if t is None else t.clone() for t in _tensors(batch)))  # type: ignore[arg-type]
        self._graph = torch.cuda.CUDAGraph()
        # other threads of this process may go on: they read data, watch collectives, and write checkpoints
        with torch.cuda.graph(
            self._graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self._report = one_pass(self._batch)

    def replay(self, batch: Batch) -> Report:
        for mine, new in zip(_tensors(self._batch), _tensors(batch), strict=True):
            if mine is not None and new is not None:
                mine.copy_(new, non_blocking=True)
        self._graph.replay()
        return {name: value.clone() for name, value in self._report.items()}


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.tokens_TB, batch.targets_TB, batch.starts_TB, batch.weights_TB


def _key(model: Model, batches: Sequence[Batch]) -> Key | None:
    """What a recording depends on; None: nothing that can be recorded."""
    shapes = {tuple(None if t is None else tuple(t.shape) for t in _tensors(batch)) for batch in batches}
    if len(shapes) != 1 or any(batch.starts_TB is not None for batch in batches):
        return None
    return model.watched, len(batches), shapes.pop()
