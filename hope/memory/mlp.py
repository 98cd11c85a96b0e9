"""Two-layer residual memories M(z) = z + c W1 silu(W2 z) (Eq. 89/91), c the contribution factor.

With h = silu(W2 k) and e = M(k) - M(v), the gradients of 1/2 |M(k) - v̂|^2 have rank one per token: c e h^T for W1 and
(c W1^T e * silu'(W2 k)) k^T for W2. Both layers are therefore gated-delta states: W2 keyed by k, shared by all
memories of the bank, W1 keyed by each memory's own hidden h (Section 4.5 defines DGD by a layer's own input).

With `forget: initial` a layer is W = W_0 + D. The state is D: it starts at zero, receives the same gradients, and is
all that alpha forgets and eta erases. With `forget: zero` (Eq. 88 literally) the state is W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hope.memory.bank import State
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaChunk, DeltaState, Gates, Written
from hope.parameters import new_parameter, normal


class MlpMemories(nn.Module):
    """Meta-learned initial states W1 [H, K, F] and W2 [H, F, K] per memory: `initial.<box>_w1`, `initial.<box>_w2`."""

    def __init__(self, boxes: tuple[str, ...], heads: int, head_dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.expansion * head_dim
        self.initial = nn.ParameterDict()
        new = lambda *shape: new_parameter(
            heads, *shape, init=normal(shape[-1] ** -0.5), cut=0, update="matrix_per_head"
        )
        for box in boxes:  # random, not zero: W1 = 0 makes every M the identity, k = v, and the error zero
            self.initial[f"{box}_w1"] = new(head_dim, hidden)
            self.initial[f"{box}_w2"] = new(hidden, head_dim)

    def bank(self, boxes: tuple[str, ...], dtype: torch.dtype) -> "MlpBank":
        outer = torch.stack([self.initial[f"{b}_w1"].to(dtype) for b in boxes], 1)
        inner = torch.cat([self.initial[f"{b}_w2"].to(dtype) for b in boxes], 1)
        return MlpBank(outer, inner, "main" in boxes, self.config)

    def flops(self, read_boxes: int, tokens_per_chunk: int, head_dim: int) -> tuple[float, float]:
        """(reads, writes) per token and head in FLOPs, forward; a multiply-add counts two."""
        k, c, f, n = head_dim, tokens_per_chunk, self.config.expansion * head_dim, read_boxes + 1
        reads = 4 * k * f * n + 2 * c * (k + f) + 2 * c * (f + k)
        writes = n * (8 * k * f + 2 * k * f) + 2 * c * k + n * (2 * c * f + c * f + c * k) + n * 4 * k * f
        return float(reads), float(writes)


@dataclass(frozen=True)
class MlpBank:
    """See `hope.memory.bank.Bank`. `outer` (W1) is [H, N, K, F]; `inner` (W2) [H, N F, K], rows of all memories."""

    outer: Tensor
    inner: Tensor
    has_main: bool
    config: MemoryConfig

    def start(self, batch: int) -> State:
        if self.config.forget == "initial":
            return tuple(DeltaState(w.new_zeros(batch, *w.shape)) for w in (self.outer, self.inner))
        return tuple(DeltaState(w.expand(batch, *w.shape)) for w in (self.outer, self.inner))

    def layers(self, state: State) -> tuple[Tensor, Tensor]:
        """W1 and W2 as the memories are read."""
        outer, inner = state[0].weight, state[1].weight
        return (self.outer + outer, self.inner + inner) if self.config.forget == "initial" else (outer, inner)

    def _hidden(self, layer: Tensor, inputs: Tensor) -> Tensor:
        """W2 z of every memory: [B, H, C, K] -> [B, H, N, C, F]."""
        rows: Tensor = (inputs @ layer.mT).unflatten(-1, (self.outer.shape[1], -1))
        return rows.transpose(-2, -3)

    def read(self, state: State, inputs: Tensor) -> Tensor:
        reads = self.outer.shape[1] - int(self.has_main)
        outer, inner = self.layers(state)
        outer, inner = outer[:, :, :reads], inner[:, :, : reads * self.outer.shape[-1]]
        hidden = (inputs @ inner.mT).unflatten(-1, (reads, -1)).transpose(-2, -3)
        return nn.functional.silu(hidden) @ outer.mT

    def write(self, state: State, keys: Tensor, values: Tensor, gates: Gates) -> tuple[State, "MlpReads"]:
        rule, scale, length = self.config.erase, self.config.contribution, keys.shape[-2]
        outer, inner = self.layers(state)
        before = self._hidden(inner, torch.cat([keys, values], -2))
        before_key, gate = before[..., :length, :], torch.sigmoid(before[..., :length, :])
        hidden = nn.functional.silu(before)
        added = hidden @ outer.mT
        added_key, added_value = added.split(length, -2)
        errors = (keys - values).unsqueeze(2) + scale * (added_key - added_value)
        if rule == "objective":
            errors = errors + keys.unsqueeze(2) + scale * added_key
        errors = scale * errors
        errors_inner = (errors @ outer) * (gate * (1 + before_key * (1 - gate)))
        hidden_key = hidden[..., :length, :]
        if rule == "layerwise":  # along the unit hidden, so that eta bounds what is erased, as it does for the unit k
            norm = (hidden_key.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            hidden_key, added_key, errors = hidden_key / norm, added_key / norm, errors * norm
        momentum = self.config.momentum
        chunk_outer = DeltaChunk(hidden_key, gates.unsqueeze(2), erase=rule == "layerwise", momentum=momentum)
        chunk_inner = DeltaChunk(keys, gates, erase=rule in ("layerwise", "input"), momentum=momentum)
        rows = lambda t: t.transpose(-2, -3).flatten(-2)
        erased, erased_inner = added_key, rows(before_key)
        if self.config.forget == "initial":  # only the difference from the initial state is erased
            erased, erased_inner = hidden_key @ state[0].weight.mT, keys @ state[1].weight.mT
        new_outer = chunk_outer.write(state[0], erased, errors)
        new_inner = chunk_inner.write(state[1], erased_inner, rows(errors_inner))
        return (new_outer.state, new_inner.state), MlpReads(new_outer, new_inner, self)

    def boundary(self, state: State, queries: Tensor) -> Tensor:
        width = self.outer.shape[-1]
        outer, inner = self.layers(state)
        hidden = nn.functional.silu(queries @ inner[:, :, -width:].mT)
        return queries + self.config.contribution * (hidden @ outer[:, :, -1].mT)

    def output(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class MlpReads:
    outer: Written
    inner: Written
    bank: MlpBank

    def causal(self, queries: Tensor) -> Tensor:
        """The main memory is the last of the bank; its two layers are read one after the other at every token."""
        bank, width = self.bank, self.outer.start.weight.shape[-1]
        outer, inner = last_memory(self.outer), last_rows(self.inner, width)
        before = inner.read(queries, queries @ inner.start.weight.mT)
        if bank.config.forget == "initial":
            before = before + queries @ bank.inner[:, -width:].mT
        hidden = nn.functional.silu(before)
        added = outer.read(hidden, hidden @ outer.start.weight.mT)
        if bank.config.forget == "initial":
            added = added + hidden @ bank.outer[:, -1].mT
        return queries + bank.config.contribution * added


def last_rows(written: Written, rows: int) -> Written:
    """The part of a write that concerns the last `rows` rows of the state."""
    cut = lambda t: None if t is None else t[..., -rows:]
    start = DeltaState(
        written.start.weight[..., -rows:, :],
        None if written.start.momentum is None else written.start.momentum[..., -rows:, :],
    )
    return Written(written.state, written.chunk, start, written.content[..., -rows:], cut(written.written))


def last_memory(written: Written) -> Written:
    """The part of a write that concerns the last memory of a bank whose memories lie on dimension 2."""
    start = DeltaState(
        written.start.weight[:, :, -1],
        None if written.start.momentum is None else written.start.momentum[:, :, -1],
    )
    extra = None if written.written is None else written.written[:, :, -1]
    return Written(written.state, written.chunk.select(-1), start, written.content[:, :, -1], extra)
