"""What a recording of passes is made with, and what it depends on. `graphs` and `stage_graphs` say what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hope.batch import Batch
from hope.model import Model

T = TypeVar("T")


class Key(NamedTuple):
    """What the passes of a step depend on, but for numbers.

    watched: whether mixers collect what they report.
    micro_batches: how many.
    shapes: of the tensors of each, None for one that is not there.
    """

    watched: bool
    micro_batches: int
    shapes: tuple[tuple[int, ...] | None, ...]


def key_of(models: Sequence[Model], batches: Sequence[Batch]) -> Key | None:
    """None: nothing that can be recorded, since shapes differ or depend on marks of documents."""
    shapes = {tuple(None if t is None else tuple(t.shape) for t in tensors_of(batch)) for batch in batches}
    if len(shapes) != 1 or any(batch.starts_TB is not None for batch in batches):
        return None
    return Key(any(model.watched for model in models), len(batches), shapes.pop())


def tensors_of(batch: Batch) -> tuple[Tensor | None, ...]:
    """All that a batch has room for."""
    return batch.tokens_TB, batch.targets_TB, batch.starts_TB, batch.weights_TB


def memory_for(batch: Batch) -> Batch:
    """A batch that a recording reads: the same numbers, in memory of its own."""
    return Batch(*(None if t is None else t.clone() for t in tensors_of(batch)))  # type: ignore[arg-type]


def refill(memory: Batch, batch: Batch) -> None:
    """Put other numbers into what `memory_for` made."""
    for mine, new in zip(tensors_of(memory), tensors_of(batch), strict=True):
        if mine is not None and new is not None:
            mine.copy_(new, non_blocking=True)


class Recorder:
    """Makes CUDA graphs of this thread's work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        torch.cuda.synchronize(self._device)

    def free(self) -> None:
        """Give back the memory that nothing uses."""
        torch.cuda.empty_cache()

    def pool(self) -> Any:
        """New memory for `record`."""
        return torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T], pool: Any) -> Callable[[], T]:
        """What repeats `work`, in the same memory, and returns the same tensors with new numbers.

        Python runs `work` once, here, and nothing is computed. Recordings with one pool may use the memory that an
        earlier one let go: they are replayed in the order in which they were made.
        """
        graph = torch.cuda.CUDAGraph()
        # other threads of this process may go on: they read data, watch collectives, and write checkpoints
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            found = work()

        def replay() -> T:
            graph.replay()
            return found

        return replay
