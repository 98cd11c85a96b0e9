"""What a memory kind must offer to self-modifying Titans: a bank of memories that are written with the same keys.

A *bank* is bound to the meta-learned initial states for the length of one forward pass; a *state* is a tuple of
`DeltaState`, one per layer of the memory, in fp32 (fp64 in tests), one set per sequence and head.

Shapes: B sequences, H heads, C tokens of a chunk, K head width, N memories ("boxes") of the bank.
"""

from typing import Protocol

import torch
from torch import Tensor

from hope.memory.delta import DeltaState, Gates

State = tuple[DeltaState, ...]


class ChunkReads(Protocol):
    """Reads of the main memory inside a chunk whose writes are done."""

    def causal(self, queries: Tensor) -> Tensor:
        """Features of M_t q_t, [B, H, C, F]; `Bank.output` turns them into [B, H, C, K]."""


class Bank(Protocol):
    """N memories over one forward pass."""

    def start(self, batch: int) -> State:
        """The meta-learned initial state of `batch` sequences."""

    def read(self, state: State, inputs: Tensor) -> Tensor:
        """What the memories add to the static path: [B, H, C, K] -> [B, H, N, C, K], the main memory left out."""

    def write(self, state: State, keys: Tensor, values: Tensor, gates: Gates) -> tuple[State, ChunkReads]:
        """Write a chunk by delta gradient descent on 1/2 |M(k) - stopgrad M(v)|^2 (Eq. 83-90).

        All gradients are taken at `state`; v̂ = M(v) is a constant of the inner gradient, not of the outer graph.
        """

    def boundary(self, state: State, queries: Tensor) -> Tensor:
        """Features of M_s q_t with the state at the chunk's start (Eq. 90 literally), [B, H, C, F]."""

    def output(self, features: Tensor) -> Tensor:
        """[B, H, T, F] -> the main memory's output y [B, H, T, K]."""


def reset_rows(state: State, initial: State, rows: Tensor) -> State:
    """Where rows [B] is true, a sequence starts anew from its initial state; no gradient reaches its past."""
    return tuple(_choose(rows, i, s) for s, i in zip(state, initial, strict=True))


def keep_rows(before: State, after: State, rows: Tensor) -> State:
    """`before` where rows [B] is true, else `after`."""
    return tuple(_select(rows, b, a) for b, a in zip(before, after, strict=True))


def _choose(rows: Tensor, initial: DeltaState, state: DeltaState) -> DeltaState:
    rows = rows.view(-1, *([1] * (state.weight.ndim - 1)))
    weight = initial.weight.where(rows, state.weight)
    momentum = None if state.momentum is None else state.momentum.masked_fill(rows, 0.0)
    return DeltaState(weight, momentum)


def _select(rows: Tensor, chosen: DeltaState, other: DeltaState) -> DeltaState:
    rows = rows.view(-1, *([1] * (other.weight.ndim - 1)))
    momentum = other.momentum
    if momentum is not None:  # a state that was never written has none: zero
        held = torch.zeros_like(momentum) if chosen.momentum is None else chosen.momentum
        momentum = held.where(rows, momentum)
    return DeltaState(chosen.weight.where(rows, other.weight), momentum)
