"""FLOP accounting. Every module states its own FLOPs per token; this file only adds them up.

A multiply-add counts two. `dense` holds parameter products, attention scores and memory reads; `writes` the updates of
the fast weights, counted apart so that an MFU can be given with and without them. Backward costs twice the forward.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token."""

    dense: float = 0.0
    writes: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.dense + other.dense, self.writes + other.writes)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.dense * times, self.writes * times)

    @property
    def forward(self) -> float:
        return self.dense + self.writes

    @property
    def training(self) -> float:
        """Forward and backward, 3x the forward; recomputation is not counted."""
        return 3.0 * self.forward
