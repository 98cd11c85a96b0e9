"""Tensors of a checkpoint, from its raw files: mapped, so that only what is used is read from the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hope.stored.manifest import Chunk, TensorEntry


def read_chunk(folder: Path, tensor: TensorEntry, chunk: Chunk) -> Tensor:
    """A chunk as a tensor that maps its file; do not write into it."""
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if chunk.bytes == 0:
        return torch.empty(chunk.shape, dtype=dtype)
    size = chunk.start + chunk.bytes
    mapped = torch.from_file(str(folder / chunk.file), shared=False, size=size, dtype=torch.uint8)
    return mapped[chunk.start : size].view(dtype).view(chunk.shape)


def read_tensor(folder: Path, tensor: TensorEntry) -> Tensor:
    """A whole tensor; maps its file where it is one chunk."""
    if len(tensor.chunks) == 1:
        return read_chunk(folder, tensor, tensor.chunks[0])
    whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    for chunk in tensor.chunks:
        narrowed(whole, chunk.at, chunk.shape).copy_(read_chunk(folder, tensor, chunk))
    return whole


def narrowed(tensor: Tensor, at: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The view of a box."""
    for dim, (first, length) in enumerate(zip(at, shape, strict=True)):
        tensor = tensor.narrow(dim, first, length)
    return tensor
