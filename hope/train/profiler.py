"""Some training steps under torch's profiler: a Chrome trace, and the time of every kind of module and kernel.

A module's time is that of the operations that began in its forward pass and in no module inside it, and of their
backward passes, which autograd numbers alike. A block that is compiled as a whole has no modules inside, and a pass
that is a CUDA graph has none at all. On a GPU it is the time of their kernels, else of the CPU.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_MODULE, _BACKWARD = "module::", "autograd::engine::evaluate_function: "
_OUTSIDE = "(no module: loss, sums over ranks, optimizer)"


class StepProfiler:
    """Profiles the steps [first, last] of this process, if it is the one that `keeps` the trace.

    Args:
        steps: `train.profile`; None: none.
        models: this rank's part of the model.
        folder: gets `step_FIRST_LAST.rank0.json.gz`, for chrome://tracing or ui.perfetto.dev.
    """

    def __init__(
        self, steps: Sequence[int] | None, models: Sequence[nn.Module], folder: Path, device: torch.device, keeps: bool
    ) -> None:
        self._steps = tuple(steps) if steps and keeps else (1, 0)
        self._models, self._folder, self._device = models, folder, device
        self._profile: profile | None = None
        self._hooks: list[Any] = []
        self._began = self._ended = 0  # the first and the last whole step that was recorded
        self._texts: list[str] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, which nothing here is part of."""
        first, last = self._steps
        if first <= number <= last and self._profile is None:
            self._start(number)
        yield
        self._ended = number
        if self._profile is not None and number >= last:
            self.close()

    def _start(self, number: int) -> None:
        self._began, self._ended = number, number - 1
        for model in self._models:
            for name, module in _seen(model):
                self._hooks += _ranges(module, _MODULE + re.sub(r"\.\d+(?=\.|$)", ".*", name))
        gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profile.start()

    def close(self) -> None:
        """End what is going on, also before its last step, and write down the whole steps, if there are any."""
        found, self._profile = self._profile, None
        if found is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._ended < self._began:  # its first step has failed, and the reason for that is what counts
            return
        path = self._folder / f"step_{self._began}_{self._ended}.rank0.json.gz"
        steps = self._ended - self._began + 1
        self._texts.append(time_by_module(found, steps, self._device.type))
        if self._device.type == "cuda":
            self._texts.append(time_by_kernel(found.key_averages(), steps))
        try:
            _export(found, path)
            self._texts.append(f"profile of steps {self._began} to {self._ended}: {path}")
        except OSError as error:
            self._texts.append(f"profile: {path} cannot be written: {error.strerror}; training goes on")

    def told(self) -> Iterator[str]:
        """What there is to say since the last call."""
        texts, self._texts = self._texts, []
        yield from texts


def _export(found: profile, path: Path) -> None:
    """Never half a trace under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        found.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _seen(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below this one by name, but for those inside of a block that is compiled as a whole."""
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(hidden):
            continue
        if getattr(module, "whole", None) is not None:
            hidden += (f"{name}.",)
        yield name, module


def _ranges(module: nn.Module, name: str) -> list[Any]:
    """Hooks that put every forward pass of a module into a range of that name."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def time_by_module(found: profile, steps: int, device: str) -> str:
    """A table: ms per step of every kind of module, forward (with what is computed again) and backward, largest first;
    its last line is the sum."""
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    events = [event for event in found.events() if event.device_type == DeviceType.CPU]
    module_of = {id(event): _innermost(event) for event in events}
    # The last operation with a number is the one with the backward pass: those before it that have none are given the
    # number that comes next. Every thread has numbers of its own.
    began_in: dict[tuple[int, int], str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and _node(event) is None:
            began_in[event.thread, event.sequence_nr] = module_of[id(event)] or _OUTSIDE
    for event in events:
        spent = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1000 / steps
        node = _node(event)
        inside = module_of[id(event)]
        if inside or node is None:
            times[inside or _OUTSIDE][0] += spent
        else:
            times[began_in.get((node.fwd_thread, node.sequence_nr), _OUTSIDE)][1] += spent
    total = sum(map(sum, times.values()))
    lines = [f"{'module':<48}{'forward ms':>12}{'backward ms':>13}{'share':>8}"]
    for name, (forward, backward) in sorted(times.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{name:<48}{forward:>12.3f}{backward:>13.3f}{(forward + backward) / (total or 1):>8.1%}")
    sums = [sum(column) for column in zip(*times.values(), strict=True)] or [0.0, 0.0]
    lines.append(f"{'all, per step':<48}{sums[0]:>12.3f}{sums[1]:>13.3f}{1:>8.1%}")
    return "\n".join(lines)


def time_by_kernel(averages: Iterable[Any], steps: int, most: int = 25) -> str:
    """A table: ms per step and calls per step of the kernels that take most of the device's time. It holds for passes
    that a CUDA graph launches too, of which no module is known."""
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    lines = [f"{'kernel':<72}{'calls':>8}{'ms':>10}{'share':>8}"]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:most]:
        spent = event.self_device_time_total
        name = re.sub(r"\s+", " ", event.key)[:70]
        lines.append(f"{name:<72}{event.count / steps:>8.0f}{spent / 1000 / steps:>10.3f}{spent / (total or 1):>8.1%}")
    lines.append(f"{'all kernels, per step':<72}{'':>8}{total / 1000 / steps:>10.3f}{1:>8.1%}")
    return "\n".join(lines)


def _innermost(event: Any) -> str | None:
    """The module that an event is in, or is the range of."""
    while event is not None:
        if event.name.startswith(_MODULE):
            return str(event.name.removeprefix(_MODULE))
        event = event.cpu_parent
    return None


def _node(event: Any) -> Any:
    """The node of the backward pass that an event is part of, or None."""
    while event is not None and not event.name.startswith(_BACKWARD):
        event = event.cpu_parent
    return event
