"""What every step computes on: tokens, targets, and what is known of documents and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or a whole batch; T time, B sequences.

    Attributes:
        tokens_TB: inputs, int64 [T, B].
        targets_TB: the token after each input, int64 [T, B].
        starts_TB: bool [T, B], True where an input is the first of a document or of the window; None
            if state is carried over document boundaries, or if every row is one document.
        weights_TB: float32 [T, B], what each target's loss counts; None if all count 1.
    """

    tokens_TB: Tensor
    targets_TB: Tensor
    starts_TB: Tensor | None = None
    weights_TB: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from where `to` does not wait for what the GPU is doing."""
        return self._each(torch.Tensor.pin_memory)

    def sequences(self, first: int, last: int) -> Batch:
        """The sequences [first, last)."""
        return self._each(lambda tensor: tensor[:, first:last].contiguous())

    def reordered(self, order: Tensor) -> Batch:
        """The same sequences in another order [B]."""
        return self._each(lambda tensor: tensor[:, order])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        starts_TB, weights_TB = (None if part is None else change(part) for part in (self.starts_TB, self.weights_TB))
        return Batch(change(self.tokens_TB), change(self.targets_TB), starts_TB, weights_TB)
