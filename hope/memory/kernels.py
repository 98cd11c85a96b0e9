"""Which form of the memory loop runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from hope.devices import has_triton
from hope.documents import Documents
from hope.memory.config import MemoryConfig
from hope.memory.fused_scan import fused_scan
from hope.memory.given.ops import fused_memory
from hope.memory.linear import in_squares, linear_memory
from hope.memory.linear_config import RULES, LinearConfig
from hope.memory.scan import Scanned, scan
from hope.memory.two_layer.ops import two_layer_scan

HEADS = {torch.bfloat16: (64, 128), torch.float32: (64,)}
"""Widths of heads by the weights' dtype. In fp32 a head of 128 needs 288 KB of shared memory, an H100 has 227."""
CHUNKS = (64,)
"""Chunks that were checked on a GPU. 128 was interpreted and compiled, for all of `HEADS`, and not yet run: it belongs
here once `python benchmarks/memory_kernels.py check --chunk 128` has found it right."""
MLP_HEADS, MLP_CHUNK = (64,), 64
"""Heads and the chunk whose `mlp` memories have kernels, in bf16: benchmarks/mlp_kernels.py has their check. They have
no form in blocks, as `hope.memory.fused` has for longer chunks."""
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}


class ScanChoice(NamedTuple):
    """A form of the loop with `scan`'s signature, its name, the reason for it if it is not the fast one, and the dtype
    in which it wants x and q (None: at least fp32)."""

    scan: Callable[..., Scanned]
    name: str
    reason: str = ""
    operands: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def scan_for(config: MemoryConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> ScanChoice:
    """The fastest form of the loop that fits the memory, the device and the weights' dtype. Of the meta device, where
    a run's memory is predicted: that of the GPU it is predicted for, though triton may be missing here."""
    if config.kernel == "plain":
        return ScanChoice(scan, "plain", "as configured")
    if device.type not in ("cuda", "meta"):
        return ScanChoice(scan, "plain", device.type.upper())
    against_type = _against_type_of_mlp(dtype) if config.memory == "mlp" else _against_type(dtype, head_dim)
    if reason := _against_memory(config, head_dim) or against_type:
        return ScanChoice(scan, "plain", reason)
    if device.type == "cuda" and not has_triton():
        return ScanChoice(scan, "plain", "no triton")
    form = two_layer_scan if config.memory == "mlp" else fused_scan
    return ScanChoice(partial(form, operands=dtype, precision="tf32"), "fused", operands=dtype)


class LinearChoice(NamedTuple):
    """A form of the linear family's loop with `linear_memory`'s signature, its name, and the reason for it if it is not
    the fast one."""

    memory: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name

    def within(self, documents: Documents | None) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The loop that forgets everything at borders of `documents`: always `linear_memory`, this form knows none."""
        return self.memory if documents is None else partial(linear_memory, segment=documents.segment_BT)


def linear_for(config: LinearConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> LinearChoice:
    """`scan_for` of the linear family."""
    row = RULES[config.rule]  # and not config.resolved(), which torch.compile cannot trace inside a block
    normaliser = row.normaliser if config.normaliser is None else config.normaliser
    reasons = {"decay per channel": (config.decay or row.decay) == "channel", "a normaliser": normaliser}
    return _given_for(config.kernel, config.chunk, device, dtype, head_dim, reasons)


def shared_keys_for(
    kernel: str, chunk: int, device: torch.device, dtype: torch.dtype, head_dim: int, keys: int
) -> LinearChoice:
    """`linear_for` of memories [head_dim, keys] with a decay per head that do not erase (Mamba-2). The kernels' are
    square: wider keys are cut."""
    found = _given_for(kernel, chunk, device, dtype, head_dim, {f"state {keys}": keys % head_dim > 0})
    if found.name == "plain" or keys == head_dim:
        return found
    return found._replace(memory=partial(in_squares, found.memory))


def _given_for(
    kernel: str, chunk: int, device: torch.device, dtype: torch.dtype, head_dim: int, reasons: dict[str, bool]
) -> LinearChoice:
    plain = lambda reason: LinearChoice(linear_memory, "plain", reason)
    if kernel == "plain":
        return plain("as configured")
    if device.type not in ("cuda", "meta"):
        return plain(device.type.upper())
    reasons = {
        **reasons,
        f"chunk {chunk}": chunk not in CHUNKS,
        f"heads of {head_dim}": head_dim not in HEADS[torch.bfloat16],
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), "") or _against_type(dtype, head_dim):
        return plain(reason)
    if device.type == "cuda" and not has_triton():
        return plain("no triton")
    return LinearChoice(partial(fused_memory, operands=dtype), "fused")


def _against_memory(config: MemoryConfig, head_dim: int) -> str:
    """Why the kernels cannot compute this memory anywhere, or nothing."""
    chunks, mlp = (config.projection_chunk, config.main_chunk), config.memory == "mlp"
    widths = MLP_HEADS if mlp else HEADS[torch.bfloat16]
    rules = ("layerwise",) if mlp else ("layerwise", "input")  # one rule for a matrix
    reasons = {
        f"expansion {config.expansion}": mlp and config.expansion != 1,
        f"forget {config.forget}": config.forget != "initial",
        f"chunks {chunks[0]} and {chunks[1]}": chunks[0] != chunks[1],
        f"chunk {chunks[0]}": chunks[0] not in ((MLP_CHUNK,) if mlp else CHUNKS),
        f"heads of {head_dim}": head_dim not in widths,
        f"read {config.read}": config.read != "causal",
        "momentum": config.momentum > 0,
        "adaptive query": config.adaptive_query,
        f"self_made {config.self_made}": config.self_made != "all",
        f"erase {config.erase}": config.erase not in rules,
        "an erase rate of its own": config.erase_max is not None,
        "values not normalised": not config.normalise_values,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _against_type_of_mlp(dtype: torch.dtype) -> str:
    return "" if dtype == torch.bfloat16 else SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _against_type(dtype: torch.dtype, head_dim: int) -> str:
    if dtype not in HEADS:
        return SHORT.get(dtype, str(dtype).removeprefix("torch."))
    if head_dim not in HEADS[dtype]:
        return f"fp32 heads of {head_dim}"
    # without it products of 64 x 64 are unrolled into single multiplications: more than 170 s to compile
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "fp32 without TF32"
    return ""
