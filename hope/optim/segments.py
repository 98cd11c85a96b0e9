"""Which tensors lie in a parameter, and its elements in pieces small enough for temporaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# Elements per element-wise operation. On a CPU: temporaries, the mlp's hidden layer of 8 included, that stay in the
# second-level cache and below malloc's threshold for fresh pages (32k elements took 20 times as long per element).
# On a GPU, where no kernel takes a whole parameter (hope/optim/fused.py) or statistics need copies: 16 MiB each, so few
# launches that they do not show; the hidden layer makes 33M elements of it.
CHUNK = {"cpu": 1 << 13, "cuda": 1 << 22}


@dataclass(frozen=True)
class Piece:
    """`parameter.view(-1)[start : start + numel]` belongs to tensor number `tensor` of the parameter."""

    tensor: int
    start: int
    numel: int


@dataclass(frozen=True)
class Segments:
    """All pieces of a parameter, padding left out; `tensors` counts also those without a piece here."""

    tensors: int
    pieces: tuple[Piece, ...]

    @staticmethod
    def single(parameter: Tensor) -> Segments:
        """A parameter that is one whole tensor."""
        return Segments(1, (Piece(0, 0, parameter.numel()),))


def chunks(start: int, numel: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` elements that cover [start, start + numel)."""
    for first in range(start, start + numel, size):
        yield slice(first, min(first + size, start + numel))
