"""Deep memories with given keys and values as one function of tensors: Titans' long-term memory and TTT's inner model.

A memory is a network of L layers per head, and what it holds is its weights:

    M(z) = [z +] [norm] W_L s(W_{L-1} ... s(W_1 z))

With G_t the gradient of 1/2 |M(k_t) - v_t|^2 by a layer's W, every layer obeys (Behrouz et al., 2024, Eq. 9-14)

    S_t = eta_t S_{t-1} - theta_t G_t                     momentum: past and momentary surprise
    W_t = (1 - alpha_t) W_{t-1} + S_t                     weight decay: forgetting
    y_t = M_t(q_t)

Gradients are taken at the first state of a chunk (Eq. 16; mini-batches in Sun et al., 2024), and are of rank one per
token. Both recurrences then are sums over the tokens of the chunk, with weights that all layers share
(`hope.memory.delta` without erasing), and W_t q_t is read for every t without making W_t. A chunk of one token is the
recurrence itself. The factor 2 of |.|^2 is in theta.

Shapes: B sequences, H heads, L padded tokens, C tokens of a chunk, K head width, F hidden width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import ChunkLayout
from hope.memory.bank import State, keep_rows, reset_rows
from hope.memory.delta import DeltaChunk, DeltaState, Gates, Written
from hope.memory.shapes import shapes_only

Activation = Literal["silu", "gelu"]
EPSILON = 1e-6
"""Added to the variance in the memory's norm."""


class Writes(NamedTuple):
    """What is written: keys and values [B, H, L, K], theta [B, H, L], log(1 - alpha) and log eta [B, H, L], or None for
    nothing forgotten, no momentum. Padding is all zeros."""

    keys: Tensor
    values: Tensor
    theta: Tensor
    log_keep: Tensor | None
    log_momentum: Tensor | None


@dataclass(frozen=True)
class DeepMemory:
    """The network: its weights before the first token, [H, out, in] each, first layer first.

    norm: weight and bias [H, K] of a layer norm of the last product, or None. residual: whether z is added.
    """

    initial: tuple[Tensor, ...]
    activation: Activation
    residual: bool
    norm: tuple[Tensor, Tensor] | None
    momentum: bool

    def start(self, batch: int) -> State:
        """The initial weights of `batch` sequences, with no momentum yet."""
        whole = [w.expand(batch, *w.shape) for w in self.initial]
        return tuple(DeltaState(w, torch.zeros_like(w) if self.momentum else None) for w in whole)

    def through(self, inputs: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """M(inputs), by what each layer does to its input. [..., K] -> [..., K]."""
        hidden = inputs
        for number, layer in enumerate(layers):
            hidden = layer(hidden if number == 0 else activated(hidden, self.activation))
        if self.norm is not None:
            scale, shift = self._per_head()
            hidden = scale * standardised(hidden)[0] + shift
        return inputs + hidden if self.residual else hidden

    def read(self, state: State, queries: Tensor) -> Tensor:
        """M(q) with the weights of `state`, [B, H, C, K]."""
        return self.through(queries, [lambda z, w=layer.weight: z @ w.mT for layer in state])  # type: ignore[misc]

    def gradients(self, state: State, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of 1/2 |M(k) - v|^2 by every layer's W: the factors e, h of e_t h_t^T per token, [B, H, C, out] and
        [B, H, C, in]."""
        weights = [layer.weight for layer in state]
        inputs, products = [keys], [keys @ weights[0].mT]
        for weight in weights[1:]:
            inputs.append(activated(products[-1], self.activation))
            products.append(inputs[-1] @ weight.mT)
        error = self._output_error(keys, products[-1], values)
        errors = [error]
        for weight, product in zip(reversed(weights[1:]), reversed(products[:-1]), strict=True):
            errors.append((errors[-1] @ weight) * slope(product, self.activation))
        return list(zip(reversed(errors), inputs, strict=True))

    def _output_error(self, keys: Tensor, product: Tensor, values: Tensor) -> Tensor:
        """The gradient by the last product."""
        target = values - keys if self.residual else values
        if self.norm is None:
            return product - target
        scale, shift = self._per_head()
        normal, spread = standardised(product)
        error = (scale * normal + shift - target) * scale
        along = (error * normal).mean(-1, keepdim=True)
        by_product: Tensor = (error - error.mean(-1, keepdim=True) - normal * along) / spread
        return by_product

    def _per_head(self) -> tuple[Tensor, Tensor]:
        assert self.norm is not None
        scale, shift = self.norm
        return scale.unsqueeze(-2), shift.unsqueeze(-2)

    def write(self, state: State, writes: Writes, valid: Tensor | None) -> tuple[State, list[Written]]:
        """Write a chunk, all gradients at `state`. valid: [B, 1, C], 0 at padding; None: there is none."""
        theta = writes.theta
        keep = torch.zeros_like(theta) if writes.log_keep is None else writes.log_keep
        momentum = 0.0 if writes.log_momentum is None else writes.log_momentum
        chunk = DeltaChunk(writes.keys, Gates(theta, keep, valid), erase=False, momentum=momentum)
        written = [
            chunk.with_keys(inputs).write(layer, errors, errors)
            for layer, (errors, inputs) in zip(state, self.gradients(state, writes.keys, writes.values), strict=True)
        ]
        return tuple(w.state for w in written), written

    def causal(self, written: Sequence[Written], queries: Tensor) -> Tensor:
        """M_t(q_t) for every token of the chunk, its own write included. [B, H, C, K]."""
        return self.through(queries, [lambda z, w=w: w.read(z, z @ w.start.weight.mT) for w in written])  # type: ignore[misc]


def deep_memory(
    memory: DeepMemory, queries: Tensor, writes: Writes, layout: ChunkLayout, chunk: int, state: State | None
) -> tuple[Tensor, State]:
    """All reads y [B, H, L, K], and the state at every row's last chunk border.

    Args:
        queries: [B, H, L, K], laid out as `layout` says, as `writes` are.
        chunk: tokens between gradients at a new state, the layout's window.
        state: at the first token of the layout; None: the initial weights.
    """

    def step(now: State, tensors: Sequence[Tensor | None], real: Tensor | None) -> tuple[Tensor, State]:
        q, *written = tensors
        assert q is not None
        after, reads = memory.write(now, Writes(*written), real)  # type: ignore[arg-type]
        return memory.causal(reads, q), after

    return over_chunks(step, (queries, *writes), memory.start(queries.shape[0]), layout, chunk, state)


Step = Callable[[State, Sequence[Tensor | None], Tensor | None], tuple[Tensor, State]]
"""(state at the chunk's start, its tensors, its valid tokens [B, 1, C]) -> (reads [B, H, C, K], state at its end)."""


def over_chunks(
    step: Step,
    tensors: Sequence[Tensor | None],
    initial: State,
    layout: ChunkLayout,
    chunk: int,
    state: State | None,
) -> tuple[Tensor, State]:
    """`step` for one chunk after the other: reads [B, H, L, K], and the state at every row's last chunk border.

    Args:
        tensors: [B, H, L, ...], or None.
        initial: the state that documents begin with.
        state: at the first token of the layout; None: the initial one.
    """
    state = initial if state is None else state
    if shapes_only(initial[0].weight):
        read, after = step(state, [None if t is None else t[:, :, :chunk] for t in tensors], None)
        return read.new_empty(*read.shape[:2], layout.padded, *read.shape[3:]), after
    outputs = []
    # cut by unbind: slices inside the loop would make the backward quadratic in the number of chunks
    cut = lambda t: [None] * (layout.padded // chunk) if t is None else t.unflatten(2, (-1, chunk)).unbind(2)
    valid = None if layout.valid is None else layout.valid.to(initial[0].weight.dtype).unsqueeze(1)
    for index, (real, *pieces) in enumerate(zip(cut(valid), *map(cut, tensors), strict=True)):
        if layout.resets is not None:
            state = reset_rows(state, initial, layout.resets[:, index])
        read, after = step(state, pieces, real)
        outputs.append(read)
        unfinished = layout.partial[index]
        if unfinished is None:
            state = after
        elif isinstance(unfinished, Tensor):
            state = keep_rows(state, after, unfinished)
    return torch.cat(outputs, 2), state


def activated(x: Tensor, kind: Activation) -> Tensor:
    """s(x)."""
    return F.silu(x) if kind == "silu" else F.gelu(x)


def slope(x: Tensor, kind: Activation) -> Tensor:
    """s'(x)."""
    if kind == "silu":
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """The last dimension with mean 0 and variance 1, and the deviation that it was divided by."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return centred / spread, spread


def flops(depth: int, head_dim: int, hidden: int, chunk: int, momentum: bool) -> tuple[float, float]:
    """(reads, writes) per token and head, forward, a multiply-add counting two; products inside chunks half of the
    square."""
    widths = [head_dim, *[hidden] * (depth - 1), head_dim]
    pairs = list(itertools.pairwise(widths))
    weights = 2.0 * sum(a * b for a, b in pairs)
    inside = float(chunk * sum(a + b for a, b in pairs))
    backward = weights - 2.0 * pairs[0][0] * pairs[0][1]  # the first layer's input has no gradient
    states = 1 + momentum
    return states * weights + inside, weights + backward + states * weights
