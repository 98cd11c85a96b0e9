"""Which form cuts the trunk into heads and merges them, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hope.devices import has_triton
from hope.heads import ops
from hope.memory.config import MemoryConfig
from hope.memory.kernels import SHORT

HEADS = (16, 32, 64, 128, 256)
"""Widths of heads: a tile's must be a power of two."""
TAPS = 4
"""The most taps: the backward kernel keeps what each lag needs in registers."""


class HeadsChoice(NamedTuple):
    """`memory_input` and `merge_heads` of `hope.heads.ops`, or None for the plain ones; the form's name, and the reason
    if it is not the fast one."""

    memory_input: Callable[..., Tensor] | None
    merge_heads: Callable[..., Tensor] | None
    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def heads_for(config: MemoryConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> HeadsChoice:
    """The fastest form that fits the convolution, the device and the weights' dtype, whatever the memory. Of the meta
    device, where a run's memory is predicted: that of the GPU it is predicted for."""
    if reason := _against_fused(config, device, dtype, head_dim):
        return HeadsChoice(None, None, "plain", reason)
    return HeadsChoice(ops.memory_input, ops.merge_heads, "fused")


def _against_fused(config: MemoryConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if config.kernel == "plain":
        return "as configured"
    if device.type not in ("cuda", "meta"):
        return device.type.upper()
    if dtype not in (torch.bfloat16, torch.float32):
        return SHORT.get(dtype, str(dtype).removeprefix("torch."))
    if head_dim not in HEADS:
        return f"heads of {head_dim}"
    if config.conv_width > TAPS:
        return f"{config.conv_width} taps"
    return "no triton" if device.type == "cuda" and not has_triton() else ""
