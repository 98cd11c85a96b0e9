"""A rank's states copied to host memory: the only part of a save that training waits for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from parallel.optimizer.checkpoint_views import StatePiece


class HostMemory:
    """One buffer per dtype, pinned beside a GPU, allocated once: by `reserve`, or else by the first save.

    Allocating pinned memory takes about half a second per GB, which a training step would wait for. It is as large as
    this rank's share of the state, so a node's host memory holds the state of its ranks once more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def reserve(self, pieces: Iterable[StatePiece]) -> dict[torch.dtype, int]:
        """Allocate what a copy of these pieces needs; how many numbers of each dtype that is."""
        sizes: dict[torch.dtype, int] = {}
        for piece in pieces:
            sizes[piece.values.dtype] = sizes.get(piece.values.dtype, 0) + piece.values.numel()
        for dtype, size in sizes.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < size:
                self._buffers[dtype] = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
        return sizes

    def copy(self, pieces: Iterable[StatePiece]) -> list[StatePiece]:
        """The same pieces with values in host memory, valid until the next call; done when this returns."""
        own = list(pieces)
        sizes = self.reserve(own)
        used = dict.fromkeys(sizes, 0)
        staged = []
        for piece in own:
            dtype, numel = piece.values.dtype, piece.values.numel()
            place = self._buffers[dtype][used[dtype] : used[dtype] + numel]
            place.copy_(piece.values.detach(), non_blocking=True)
            used[dtype] += numel
            staged.append(replace(piece, values=place))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return staged


def nonfinite(pieces: Iterable[StatePiece]) -> str:
    """The first weight among these pieces that has an infinite value or a NaN, in words; empty if none has."""
    for piece in pieces:
        if piece.key == "master" and piece.values.numel():
            low, high = piece.values.aminmax()  # a NaN anywhere makes both NaN, and no mask is allocated
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                return f"{piece.name} has values that are not finite"
    return ""
