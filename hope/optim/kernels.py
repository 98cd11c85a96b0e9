"""The arithmetic of `rules` on whole parameters: in chunks, or in one launch of a kernel where the device can."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hope.optim import rules
from hope.optim.rules import Rates, Stretch, UpdateRule, Whole
from hope.optim.segments import CHUNK, Segments, chunks


class Kernels(NamedTuple):
    """`rules.update` and `rules.sums` on all pieces of a flat parameter [N].

    `Whole` has the numbers of all its tensors. Sums are [tensors, `UpdateRule.numbers`], zeros for a tensor without a
    piece.
    """

    update: Callable[[UpdateRule, Stretch, Segments, Rates, Whole], None]
    sums: Callable[[UpdateRule, Stretch, Segments, Rates, Whole], Tensor]


def kernels_for(rule: UpdateRule, x: Stretch) -> Kernels:
    """Fused in single precision on a GPU, where every operation of its own would read and write all of memory again.

    `match` is not in the fused kernels.
    """
    fits = not rule.match and all(t.is_cuda and t.dtype == torch.float32 for t in x if t is not None)
    if fits and importlib.util.find_spec("triton") is not None:
        fused = importlib.import_module("hope.optim.fused")
        return Kernels(fused.update, fused.sums)
    return Kernels(update, sums)


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
            yield piece.tensor, Stretch(x.p[span], x.s[span], None if x.v is None else x.v[span], x.g[span])
