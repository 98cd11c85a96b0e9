"""MLPs that a sequence rewrites as it goes (Eq. 71-72), as one function of tensors.

Per head M(u) = W2 silu(W1 u), with W = W_0 + D: the start W_0 is meta-learned, D is what the sequence has written. With
G_t the gradient of 1/2 |M(k_t) - v_t|^2 by W, taken at the weights of the chunk's start,

    D_t = alpha_t D_{t-1} - theta_t G_t

so that D forgets towards zero, and W towards its start. Gradients have rank one per token, and a chunk is a few matrix
products (`hope.memory.delta` without erasing; `hope.memory.deep` has the gradients).

Nested levels (Eq. 72) are several D of one MLP, each with its clock: the weights of level l are W_0 plus the D of l and
of all slower levels. When a slower level is rewritten, by its own gradients over its own chunk, the D of the faster
ones begin again at zero, which is to say at the slower one's weights. The fastest level is what is read. With one level
it is Eq. 71.

Shapes: B sequences, H heads, L padded tokens, C tokens of a chunk, K head width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hope.documents import ChunkLayout
from hope.memory.bank import State
from hope.memory.deep import DeepMemory, over_chunks
from hope.memory.delta import DeltaChunk, DeltaState, Gates, Written

Weights = tuple[Tensor, ...]
"""Of every layer, [B, H, out, in], or [H, out, in] before anything is written."""


class Tokens(NamedTuple):
    """What is brought: queries, keys, values [B, H, L, K], and per level, fastest first, theta and log alpha [B, H, L],
    0 for one that forgets nothing. Padding is all zeros."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    theta: tuple[Tensor, ...]
    log_keep: tuple[Tensor, ...]

    def cut(self, size: int) -> Iterator[Tokens]:
        """Pieces of `size` tokens."""
        count, levels = self.queries.shape[2] // size, len(self.theta)
        # by unbind: the backward of slices would be quadratic in their number
        parts = [t.unflatten(2, (count, size)).unbind(2) for t in flat(self)]
        return (together(piece, levels) for piece in zip(*parts, strict=True))


def flat(tokens: Tokens) -> tuple[Tensor, ...]:
    """All tensors side by side."""
    return (tokens.queries, tokens.keys, tokens.values, *tokens.theta, *tokens.log_keep)


def together(tensors: Sequence[Tensor | None], levels: int) -> Tokens:
    """What `flat` took apart."""
    q, k, v, *rates = (t for t in tensors if t is not None)
    return Tokens(q, k, v, tuple(rates[:levels]), tuple(rates[levels:]))


@dataclass(frozen=True)
class RewrittenMlp:
    """The MLP before the first token, and how it is rewritten.

    chunks: of each level, fastest first, each a multiple of the one before.
    causal: whether a token also sees what its own chunk has written up to it.
    own_target: whether the target is M(v) with the weights of the chunk's start, a constant of the inner gradient
        (Eq. 84); else it is v.
    """

    memory: DeepMemory
    chunks: tuple[int, ...]
    causal: bool
    own_target: bool

    def start(self, batch: int) -> State:
        """Nothing written yet."""
        return tuple(DeltaState(w.new_zeros(batch, *w.shape)) for w in self.memory.initial)

    def __call__(self, tokens: Tokens, layout: ChunkLayout, state: State | None) -> tuple[Tensor, State]:
        """All reads [B, H, L, K], and D of the slowest level at every row's last border of its chunks.

        Args:
            tokens: laid out as `layout` says, whose window is the slowest level's chunk.
            state: at the first token of the layout; None: nothing written.
        """
        levels = len(self.chunks)

        def step(now: State, tensors: Sequence[Tensor | None], real: Tensor | None) -> tuple[Tensor, State]:
            return self._chunk(levels - 1, self.memory.initial, now, together(tensors, levels))

        initial = self.start(tokens.queries.shape[0])
        return over_chunks(step, flat(tokens), initial, layout, self.chunks[-1], state)

    def unwritten(self, queries: Tensor) -> Tensor:
        """M(q) with the weights before the first token."""
        return self.memory.read(tuple(map(DeltaState, self.memory.initial)), queries)

    def _chunk(self, level: int, base: Weights, deltas: State, tokens: Tokens) -> tuple[Tensor, State]:
        """A chunk of a level whose weights are base + deltas: reads, and the deltas after it."""
        weights = tuple(w + d.weight for w, d in zip(base, deltas, strict=True))
        written = self._write(level, weights, deltas, tokens)
        after = tuple(w.state for w in written)
        if level == 0:
            return self._read(base, weights, written, tokens.queries), after
        faster, reads = tuple(DeltaState(torch.zeros_like(w)) for w in weights), []
        for piece in tokens.cut(self.chunks[level - 1]):
            read, faster = self._chunk(level - 1, weights, faster, piece)
            reads.append(read)
        return torch.cat(reads, 2), after

    def _write(self, level: int, weights: Weights, deltas: State, tokens: Tokens) -> list[Written]:
        chunk = DeltaChunk(tokens.keys, Gates(tokens.theta[level], tokens.log_keep[level]), erase=False)
        now = tuple(map(DeltaState, weights))
        values = self.memory.read(now, tokens.values) if self.own_target else tokens.values
        factors = self.memory.gradients(now, tokens.keys, values)
        return [
            chunk.with_keys(inputs).write(delta, errors, errors)
            for delta, (errors, inputs) in zip(deltas, factors, strict=True)
        ]

    def _read(self, base: Weights, weights: Weights, written: Sequence[Written], queries: Tensor) -> Tensor:
        if not self.causal:
            return self.memory.read(tuple(map(DeltaState, weights)), queries)
        layers = [
            lambda z, b=b, w=w: z @ b.mT + w.read(z, z @ w.start.weight.mT) for b, w in zip(base, written, strict=True)
        ]
        return self.memory.through(queries, layers)


def flops(levels: int, head_dim: int, hidden: int, chunk: int, causal: bool, own_target: bool) -> tuple[float, float]:
    """(reads, writes) per token and head, forward, a multiply-add counting two; products inside chunks half of the
    square. chunk: the fastest level's."""
    weights = 4.0 * head_dim * hidden
    reads = 2 * weights + 2.0 * chunk * (head_dim + hidden) if causal else weights
    # M(k), with the target M(v), the error before the hidden layer, and the products of errors and inputs
    return reads, levels * (weights * (1 + own_target) + weights / 2 + weights)
