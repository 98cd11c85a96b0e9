"""Forward and backward pass of a micro-batch as one CUDA graph: the host starts it with one call.

A host issues the operations of a step one by one, some 600 per HOPE layer, and a small model's GPU waits for it. A
graph is recorded once and replayed with new numbers in the same memory. Parameters stay where they are, and so do the
tensors of a batch and the fp32 sums to which a backward pass in bf16 adds its gradients. A replay is therefore the pass
that was recorded, operation by operation.

What must be new in every pass cannot be in a graph: shapes that depend on marks of documents, with which
`train.cuda_graphs` is refused, and sends between pipeline stages, whose passes `stage_graphs` records one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hope.batch import Batch
from hope.devices import require_graphs
from hope.model import Model
from parallel.compute.pipeline import Report, StepFn
from parallel.compute.recording import Key, Recorder, key_of, memory_for, refill
from parallel.compute.stage_graphs import Scheduled, StageGraphs


def graphs_for(wanted: bool, step_fn: StepFn, device: torch.device, pipeline: int) -> Graphs | StageGraphs | None:
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
    return StageGraphs(step_fn, Recorder(device)) if pipeline > 1 else Graphs(step_fn, Recorder(device))


class Graphs:
    """The passes of a model that is whole on its pipeline rank.

    The first step with new shapes, or with mixers watched for the first time, is made as it is: it compiles kernels and
    makes the libraries' workspaces. The next one records. There is one graph for steps that the log watches and one for
    the others. They share their memory, since one is never in use while the other runs.

    Args:
        step_fn: as `parallel.compute.pipeline.forward_backward` takes it, of a stage with a loss.
    """

    def __init__(self, step_fn: StepFn, recorder: Recorder) -> None:
        self._step_fn, self._recorder = step_fn, recorder
        self._seen: set[Key] = set()
        self._graphs: dict[bool, _Graph] = {}
        self._pool: Any = None

    def run(
        self,
        models: Sequence[Model],
        batches: Sequence[Batch],
        scheduled: Scheduled,
        phase: Callable[[str], object] | None = None,
    ) -> list[Report]:
        """Gradients are ADDED as the mean over these micro-batches; a report for each.

        models: the only one.
        scheduled: the passes with a step function, without a graph.
        """
        [model] = models
        key = key_of(models, batches)
        if key is None or key not in self._seen:
            self.close()  # else memory would be held twice
            if key is not None:
                self._seen.add(key)
            return scheduled(self._step_fn)
        if phase is not None:
            phase("forward")
        reports = []
        for batch in batches:
            graph = self._graphs.get(key.watched)
            if graph is None or graph.key != key:
                graph = self._record(key, model, batch)
            reports.append(graph.replay(batch))
        return reports

    def _record(self, key: Key, model: Model, batch: Batch) -> _Graph:
        self._graphs.pop(key.watched, None)
        if not self._graphs:
            self._recorder.wait()
            self._recorder.free()  # what the passes before took is now the graph's
            self._pool = self._recorder.pool()
        self._graphs[key.watched] = graph = _Graph(
            key, batch, self._recorder, self._pool, lambda b: self._pass(model, b, key.micro_batches)
        )
        return graph

    def _pass(self, model: Model, batch: Batch, count: int) -> Report:
        """Forward and backward of one micro-batch out of `count`."""
        loss, report = self._step_fn(model, None, batch)
        (loss / count).backward()
        return {name: value.detach() for name, value in report.items()}

    def close(self) -> None:
        """Forget what was recorded, and give its memory back."""
        if self._graphs:
            self._recorder.wait()
            self._graphs.clear()
            self._recorder.free()


class _Graph:
    """One recording: the tensors that it reads and writes, and how to run it again."""

    def __init__(
        self, key: Key, batch: Batch, recorder: Recorder, pool: Any, one_pass: Callable[[Batch], Report]
    ) -> None:
        self.key = key
        self._batch = memory = memory_for(batch)
        self._again = recorder.record(lambda: one_pass(memory), pool)

    def replay(self, batch: Batch) -> Report:
        refill(self._batch, batch)
        return {name: value.clone() for name, value in self._again().items()}
