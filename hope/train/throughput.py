"""Time, speed and memory of training steps."""

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

GIB = 2**30

# Dense bf16 peak in FLOP/s by the exact name CUDA reports (NVIDIA data sheets, without sparsity): the PCIe and
# NVL variants contain these names and are slower.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, None when it is not in the table (then MFU is not reported)."""
    return PEAK_FLOPS.get(device_name)


@dataclass(frozen=True)
class Devices:
    """The devices of a run, as far as its reports need them."""

    count: int
    """Devices of the whole run."""
    kind: str = "gpu"
    """gpu or cpu: the word behind the slash of the console line."""
    memory_gb: float | None = None
    """Memory of one device in GiB, None if unknown."""
    peak_flops: float | None = None
    """Dense bf16 FLOP/s of one device, None if unknown."""

    @staticmethod
    def of(device: torch.device, count: int) -> "Devices":
        """Describe `count` devices like `device`."""
        if device.type != "cuda":
            return Devices(count, device.type)
        found = torch.cuda.get_device_properties(device)
        return Devices(count, "gpu", found.total_memory / GIB, peak_flops(found.name))


def memory_gb(device: torch.device) -> float:
    """GiB in use: on CUDA the most PyTorch has reserved so far, on CPU the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    except OSError:  # no /proc: the peak is what getrusage has, in bytes on macOS and KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def mfu(tokens_per_s: float, flops_per_token: float, devices: Devices) -> float | None:
    """Model FLOPs utilisation as a fraction: tokens/s x FLOPs per token / (devices x peak FLOP/s of one).

    FLOPs per token count forward and backward of the model, without recomputation (PaLM, appendix B).
    None when the peak is unknown.
    """
    if devices.peak_flops is None:
        return None
    return tokens_per_s * flops_per_token / (devices.count * devices.peak_flops)


class StepTimer:
    """Means of step time and data time since the last report, and the time left.

    timer.begin(); batch = next(batches); timer.got_data(); ...one step...; timer.end()

    Only time between begin and end counts, so evaluation and saving do not lower tokens/s. On CUDA read the
    loss (a synchronisation) before `end`. `clock` returns seconds.
    """

    def __init__(
        self,
        tokens_per_step: int,
        devices: Devices,
        *,
        window: int = 50,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens, self._devices, self._clock = tokens_per_step, devices, clock
        self._recent: deque[float] = deque(maxlen=window)
        self._began: float | None = None
        self._data = 0.0
        self._reset()

    def _reset(self) -> None:
        self._steps, self._step_sum, self._data_sum = 0, 0.0, 0.0

    def begin(self) -> None:
        self._began, self._data = self._clock(), 0.0

    def got_data(self) -> None:
        """The batch of this step is here; the time since `begin` was waiting for data."""
        self._data = self._clock() - self._start()

    def end(self) -> None:
        took = self._clock() - self._start()
        self._began = None
        self._steps += 1
        self._step_sum += took
        self._data_sum += self._data
        self._recent.append(took)

    def _start(self) -> float:
        if self._began is None:
            raise RuntimeError("StepTimer: begin() comes first in every step")
        return self._began

    def report(self) -> dict[str, float]:
        """step_time_s, data_time_s (means since the last report), tokens_per_s, tokens_per_s_per_device."""
        if self._steps == 0:
            raise RuntimeError("StepTimer: no step was timed since the last report")
        step, data = self._step_sum / self._steps, self._data_sum / self._steps
        self._reset()
        speed = self._tokens / step
        return {
            "step_time_s": step,
            "data_time_s": data,
            "tokens_per_s": speed,
            "tokens_per_s_per_device": speed / self._devices.count,
        }

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds for `steps_left` steps at the mean of the last `window` steps; None before the first."""
        return steps_left * sum(self._recent) / len(self._recent) if self._recent else None
