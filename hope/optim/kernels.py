"""The arithmetic of `rules` on whole parameters: in chunks, or in one launch of a kernel where the device can."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hope.devices import has_triton
from hope.optim import rules
from hope.optim.config import OptimConfig
from hope.optim.rules import Rates, Stretch, UpdateRule, Whole
from hope.optim.segments import CHUNK, Segments, chunks

_SHORT = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Kernels(NamedTuple):
    """`rules.update` and `rules.sums` on all pieces of a flat parameter [N].

    `Whole` has the numbers of all its tensors. Sums are [tensors, `UpdateRule.numbers`], zeros for a tensor without a
    piece.
    """

    update: Callable[[UpdateRule, Stretch, Segments, Rates, Whole], None]
    sums: Callable[[UpdateRule, Stretch, Segments, Rates, Whole], Tensor]


class Choice(NamedTuple):
    """Kernels, and why these. name: "fused" or "plain"; reason: why not fused, empty if they are."""

    kernels: Kernels
    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def kernels_for(rule: UpdateRule, x: Stretch) -> Choice:
    """Fused in single precision on a GPU, where every operation of its own would read and write all of memory again."""
    tensors = [t for t in x if t is not None]
    device = next((t.device.type for t in tensors if not t.is_cuda), "cuda")
    return _choice(rule, device, next((t.dtype for t in tensors if t.dtype != torch.float32), torch.float32))


def kernels_of_run(config: OptimConfig, device: str) -> Choice:
    """What `kernels_for` will say of tensors with the configured memory, before there are any.

    Args:
        config: for muon and m3 the answer is about what they leave to DMGD, all tensors that are not matrices.
        device: a type, such as "cuda". Masters are always fp32.
    """
    return _choice(UpdateRule.of(config), device, torch.float32)


def _choice(rule: UpdateRule, device: str, dtype: torch.dtype) -> Choice:
    if reason := _against_fused(rule, device, dtype):
        return Choice(Kernels(update, sums), "plain", reason)
    fused = importlib.import_module("hope.optim.fused")
    return Choice(Kernels(fused.update, fused.sums), "fused")


def _against_fused(rule: UpdateRule, device: str, dtype: torch.dtype) -> str:
    """Why the fused kernels cannot be taken, or nothing."""
    if device != "cuda":
        return device.upper()
    if rule.scalar or rule.alone:
        return "memory scalar" if rule.scalar else "memory mlp_only"
    if rule.match:
        return "rms_match"
    if dtype != torch.float32:
        return _SHORT.get(dtype, str(dtype).removeprefix("torch."))
    return "" if has_triton() else "no triton"


def update(rule: UpdateRule, x: Stretch, segments: Segments, c: Rates, whole: Whole) -> None:
    for tensor, part in stretches(x, segments):
        rules.update(rule, part, c, whole.of(tensor))


def sums(rule: UpdateRule, x: Stretch, segments: Segments, c: Rates, whole: Whole) -> Tensor:
    found = torch.zeros(segments.tensors, rule.numbers, dtype=torch.float64, device=x.p.device)
    for tensor, part in stretches(x, segments):
        found[tensor] += rules.sums(rule, part, c, whole.of(tensor))
    return found


def stretches(x: Stretch, segments: Segments) -> Iterator[tuple[int, Stretch]]:
    """(tensor, its coordinates) of all pieces in chunks."""
    for piece in segments.pieces:
        for span in chunks(piece.start, piece.numel, CHUNK[x.p.device.type]):
            yield piece.tensor, Stretch(*(None if t is None else t[span] for t in x))  # type: ignore[arg-type]
