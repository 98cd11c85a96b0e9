"""Forward and backward passes of pipeline stages as CUDA graphs, two for every micro-batch that is in flight.

A schedule starts the forward pass of a micro-batch and, other passes later, its backward pass, and sends between them.
So the passes are recorded one by one, and sends stay outside. What a forward pass keeps for its backward pass lies in
the memory of its recording. A chunk therefore has a `Slot` for every micro-batch that it holds at once, as many as the
schedule was seen to need. All are recorded between two steps, when nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.batch import Batch
from hope.mixers import Mixer
from hope.mixers import Report as Collected
from hope.model import Model
from parallel.compute.pipeline import Report, StepFn
from parallel.compute.recording import Key, Recorder, key_of, memory_for, refill

Scheduled = Callable[[StepFn], list[Report]]


class StageGraphs:
    """The passes of the model chunks on a pipeline rank.

    The first step with new shapes, or with mixers watched for the first time, is made as it is: it compiles kernels,
    makes the libraries' workspaces, and shows how many micro-batches are in flight. The next one records. Steps that
    the log watches have recordings of their own, in the same slots.

    Args:
        step_fn: as `parallel.compute.pipeline.forward_backward` takes it.
    """

    def __init__(self, step_fn: StepFn, recorder: Recorder) -> None:
        self._step_fn, self._recorder = step_fn, recorder
        self._traffic: dict[Key, dict[Model, Traffic]] = {}
        self._recorded: set[Key] = set()
        self._slots: dict[Model, list[Slot]] = {}
        # the first stage receives nothing, and autograd calls no backward pass of what has no input with a gradient
        self._nothing = torch.zeros((), requires_grad=True)

    def run(
        self,
        models: Sequence[Model],
        batches: Sequence[Batch],
        scheduled: Scheduled,
        phase: Callable[[str], object] | None = None,
    ) -> list[Report]:
        """The schedule's passes with this step function or another. Gradients are ADDED, as the mean over these
        micro-batches; the reports that the schedule returns. `scheduled` tells phases by itself."""
        key = key_of(models, batches)
        if key is None or key not in self._traffic:
            self.close()  # else memory would be held twice
            traffic = {model: Traffic() for model in models}
            reports = scheduled(self._counted(traffic))
            if key is not None:
                self._traffic[key] = traffic
            return reports
        if key not in self._recorded:
            self._record(key, batches[0])
        return scheduled(self._replayed(key))

    def close(self) -> None:
        """Forget what was recorded, and give its memory back."""
        if self._slots:
            self._recorder.wait()
            self._recorded.clear()
            self._slots.clear()
            self._recorder.free()

    def _record(self, key: Key, batch: Batch) -> None:
        if any(other[1:] != key[1:] for other in self._recorded):
            self.close()
        if not self._slots:
            self._recorder.wait()
            self._recorder.free()  # what the passes before took is now the slots'
            self._slots = {
                model: [Slot(self._step_fn, model, seen, batch, self._recorder) for _ in range(seen.most)]
                for model, seen in self._traffic[key].items()
            }
        for slots in self._slots.values():
            for slot in slots:
                slot.record(key.watched)
        self._recorded.add(key)

    def _counted(self, traffic: dict[Model, Traffic]) -> StepFn:
        """Passes as they are."""

        def step(model: Model, hidden: Tensor | None, batch: Batch) -> Tensor | tuple[Tensor, Report]:
            output = self._step_fn(model, hidden, batch)
            traffic[model].passes(hidden, output if isinstance(output, Tensor) else output[0])
            return output

        return step

    def _replayed(self, key: Key) -> StepFn:
        """Passes that were recorded."""
        free = {model: list(slots) for model, slots in self._slots.items()}  # between steps none is in use

        def step(model: Model, hidden: Tensor | None, batch: Batch) -> Tensor | tuple[Tensor, Report]:
            slot = free[model].pop()
            use = Use(slot, key.watched, batch, lambda: free[model].append(slot))
            output: Tensor = _Replay.apply(self._nothing if hidden is None else hidden, use)  # type: ignore[no-untyped-call]
            return (output, slot.report()) if model.has_head else output

        return step


class Traffic:
    """What goes through a chunk in a step: of which shape, and how much of it at once.

    Attributes:
        hidden, output: like what is received, None on the first stage, and like what is returned; they hold no memory.
        most: micro-batches whose backward pass was to come, at the worst moment.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.output = torch.empty(0, device="meta")
        self.most = self._now = 0

    def passes(self, hidden: Tensor | None, output: Tensor) -> None:
        """A forward pass has returned `output`; its backward pass begins when the output's gradient is there."""
        like = lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.hidden, self.output = None if hidden is None else like(hidden), like(output)
        self._now += 1
        self.most = max(self.most, self._now)
        output.register_hook(self._ends)

    def _ends(self, gradient: Tensor) -> None:
        self._now -= 1


class Passed(NamedTuple):
    """What a forward pass leaves: its output, its report, and what every mixer has collected in it."""

    output: Tensor
    report: Report
    collected: dict[Mixer, Collected]


class Slot:
    """Room for one micro-batch on a chunk, from its forward pass to the end of its backward pass.

    The memory of its recordings is of no other slot. With one memory for all, what the recording of a backward pass
    lets go would be taken by the recording of the next slot. But that slot's forward pass is replayed before this
    backward pass, and would write over what this one still needs.
    """

    def __init__(self, step_fn: StepFn, model: Model, seen: Traffic, batch: Batch, recorder: Recorder) -> None:
        self._step_fn, self._model, self._record, self._pool = step_fn, model, recorder.record, recorder.pool()
        device = batch.tokens_TB.device
        self._batch = memory_for(batch)
        self._gradient = torch.zeros_like(seen.output, device=device)
        self._hidden = None if seen.hidden is None else torch.zeros_like(seen.hidden, device=device).requires_grad_()
        self._live: Tensor | None = None
        self._passes: dict[bool, tuple[Callable[[], Passed], Callable[[], Tensor | None]]] = {}
        self._report: Report = {}

    def record(self, watched: bool) -> None:
        """Both passes, with mixers that are watched or not."""
        self._passes[watched] = self._record(self._forward, self._pool), self._record(self._backward, self._pool)

    def forward(self, watched: bool, hidden: Tensor, batch: Batch) -> Tensor:
        """The output, in new memory: the slot's is written again before others have read it, or freed by a schedule."""
        refill(self._batch, batch)
        if self._hidden is not None:
            self._hidden.copy_(hidden)
        output, self._report, collected = self._passes[watched][0]()
        for mixer, found in collected.items():  # Python has not run the pass: the mixer has that of another slot
            mixer.collected = found
        return output.clone()

    def report(self) -> Report:
        """Of the last forward pass."""
        return {name: value.clone() for name, value in self._report.items()}

    def backward(self, watched: bool, gradient: Tensor) -> Tensor | None:
        """The gradient of what was received, in new memory; parameters' gradients are added where they always are."""
        self._gradient.copy_(gradient)
        found = self._passes[watched][1]()
        return None if found is None else found.clone()

    def _forward(self) -> Passed:
        output = self._step_fn(self._model, self._hidden, self._batch)
        self._live, report = (output, {}) if isinstance(output, Tensor) else output
        mixers = [module for module in self._model.modules() if isinstance(module, Mixer) and module.watched]
        told = {name: value.detach() for name, value in report.items()}
        return Passed(self._live.detach(), told, {mixer: mixer.collected for mixer in mixers})

    def _backward(self) -> Tensor | None:
        live, self._live = self._live, None
        assert live is not None
        live.backward(self._gradient)
        if self._hidden is None:
            return None
        found, self._hidden.grad = self._hidden.grad, None
        return found


@dataclass(frozen=True)
class Use:
    """A slot in use by a micro-batch; `ends` is called behind its backward pass."""

    slot: Slot
    watched: bool
    batch: Batch
    ends: Callable[[], object]


class _Replay(torch.autograd.Function):
    """The passes of a micro-batch on a chunk, as autograd sees them: [T, B, D] -> [T, B, D], or -> the loss."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, use: Use) -> Tensor:
        ctx.use = use
        return use.slot.forward(use.watched, received, use.batch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        use: Use = ctx.use
        found = use.slot.backward(use.watched, gradient)
        use.ends()
        return found, None
