"""Orthogonalisation of matrices by Newton-Schulz iterations (Eq. 42): products only, no decomposition."""

import torch
from torch import Tensor

from hope.optim.segments import CHUNK

# Keller Jordan's quintic, tuned for slope at zero instead of for convergence: five steps take singular values from
# 1e-2 of the largest to within about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int, half: bool = False) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of a stack [..., n, m]; zero stays zero.

    `half`: with bf16 products. Their rounding depends on which matrices share a batch.
    """
    x = matrices.bfloat16() if half else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-30)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    whole: Tensor = x.mT if tall else x
    return whole.to(matrices.dtype)


def orthogonalise_all(matrices: list[Tensor], steps: int, half: bool = False) -> list[Tensor]:
    """`orthogonalise` for every [n, m] or [H, n, m]: equal shapes in one batch, of a bounded number of elements."""
    found: dict[int, Tensor] = {}
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        shapes.setdefault((matrix.shape[-2], matrix.shape[-1]), []).append(number)
    for (n, m), numbers in shapes.items():
        for batch in _batches(matrices, numbers):
            stacks = [matrices[i].reshape(-1, n, m) for i in batch]
            out = orthogonalise(torch.cat(stacks), steps, half).split([s.shape[0] for s in stacks])
            found |= {i: part.view_as(matrices[i]) for i, part in zip(batch, out, strict=True)}
    return [found[number] for number in range(len(matrices))]


def _batches(matrices: list[Tensor], numbers: list[int]) -> list[list[int]]:
    limit = 4 * CHUNK["cuda"]
    batches: list[list[int]] = []
    held = 0
    for number in numbers:
        size = matrices[number].numel()
        if not batches or held + size > limit:
            batches.append([])
            held = 0
        batches[-1].append(number)
        held += size
    return batches
