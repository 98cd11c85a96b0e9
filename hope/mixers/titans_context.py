"""Titans with memory as a context, MAC (Behrouz et al., 2024, Section 4.1, Eq. 21-25): a segment of tokens attends to
persistent tokens, to what the memory of earlier segments says to each of its tokens, and to itself. The memory is then
written with what attention gave.

Per head, M' being the memory before the segment and z the input,

    h_t = M'(unit(W_r z_t))                                               what is remembered
    y_t = softmax attention of W_q z_t to P, (K_h h_s, V_h h_s) and (W_k z_s, W_v z_s) for s <= t in the segment
    M_t : written with unit(K_m y_s), V_m y_s for s <= t  (`hope.memory.deep`)
    o_t = norm(y_t) * sigmoid(norm(M_t(unit(Q_m y_t))))

Every token sees what is remembered for itself and for those before it: of a later one, h would tell what it is. Maps of
h and y are per head, so that the loop over segments stays with the heads of its rank. Gradients are taken once per
chunk, of which a segment has several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import NO_PENDING, Documents, Pending, layout_of
from hope.flops import Flops
from hope.layers import Linear, RMSNorm, gated, rotated, rotation, unit
from hope.memory import deep
from hope.memory.bank import State as FastWeights
from hope.memory.bank import reset_rows
from hope.memory.deep import Writes, over_chunks
from hope.memory.titans_config import WithAttentionConfig
from hope.mixers.attention import apart_from_persistent
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.mixers.long_term import Network, Rates, summary
from hope.mixers.sliding_window import with_always
from hope.mixers.vectors import heads_of, normed_and_joined
from hope.parameters import new_parameter, normal
from hope.sections import Problem


@dataclass
class ContextConfig(WithAttentionConfig):
    """Titans' memory as a context (MAC): attention in segments, inside which rotary positions are counted, and which
    sees what the memory recalls."""

    gate: Literal["silu", "sigmoid"] = "sigmoid"
    """What the memory's normed reads go through before they multiply the attention's."""
    segment: int = 512
    """Tokens that attend to each other; a multiple of chunk."""

    def paper(self) -> str:
        """Of the architecture."""
        return "Behrouz et al., 2024, Titans, memory as a context (MAC)"

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        yield from super().problems(path, head_dim)
        chunk = self.resolved().chunk
        if chunk > 0 and (self.segment < 1 or self.segment % chunk):
            what = f"{self.segment} is not a multiple of chunk {chunk}"
            yield Problem(f"{path}.segment", what, f"{max(1, self.segment // chunk) * chunk}")
        for key in ("conv_width", "unit_keys"):
            if getattr(self, key) is not None:
                what = "is not used: the memory's keys are made of attention's output, of unit length"
                yield Problem(f"{path}.{key}", what, "leave it out")


@dataclass(frozen=True)
class ContextState(State):
    """What a sequence carries from one call to the next; fp32 (fp64 in tests).

    weights: of the memory's layers at the last segment border, with their momentum.
    waiting: [B, H, P, 4 K], the attention's q, k, v and the recalling query of the tokens since that border.
    pending: how many of the P slots are taken.
    """

    weights: FastWeights
    waiting: Tensor
    pending: Pending

    def reset(self, rows: Tensor, initial: ContextState) -> ContextState:
        """Where rows [B] is true, a sequence starts anew: initial weights, nothing pending."""
        weights = reset_rows(self.weights, initial.weights, rows)
        return dataclasses.replace(self, weights=weights, pending=self.pending.without(rows))

    def compared(self) -> dict[str, Tensor]:
        """The memory's layers."""
        return {f"memory.{number}": layer.weight for number, layer in enumerate(self.weights)}


@mixer("titans_mac", section=ContextConfig)
class MemoryAsContext(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memory."""

    def __init__(self, trunk: Trunk, config: ContextConfig) -> None:
        super().__init__()
        width, heads, head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.config, self.rule, self.head_dim = config, config.resolved(), head_dim
        self.chunk, self.persistent = config.segment, config.persistent
        projection = lambda: Linear(width, width, "column", head_dim)
        self.query, self.key, self.value, self.recall = (projection() for _ in range(4))
        square = lambda: new_parameter(
            heads, head_dim, head_dim, init=normal(head_dim**-0.5), cut=0, update="matrix_per_head"
        )
        self.recalled_key, self.recalled_value = square(), square()
        self.memory_query, self.memory_key, self.memory_value = (square() for _ in range(3))
        learned = lambda: new_parameter(
            heads, config.persistent, head_dim, init=normal(0.4), cut=0, update="elementwise"
        )
        if self.persistent:
            self.persistent_keys, self.persistent_values = learned(), learned()
        self.rates = Rates(heads, head_dim, config, head_dim)
        self.network = Network(heads, head_dim, config)
        self.norm_memory, self.norm_attention = (RMSNorm(head_dim, used="heads") for _ in range(2))
        self.output = Linear(width, width, "row")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, ContextState]:
        assert state is None or isinstance(state, ContextState)
        x_TBD = self.enter(x_TBD)
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        projections = self.query, self.key, self.value, self.recall
        q, k, v, r = (self.form(heads_of)(project(x_TBD), self.head_dim, wide) for project in projections)
        tokens = torch.cat([q, k, v, unit(r)], -1)
        pending, before = (NO_PENDING, None) if state is None else (state.pending, state.weights)
        if state is not None and pending.slots:
            tokens = torch.cat([state.waiting, tokens], 2)
        layout, loop = layout_of(x_TBD, documents, self.chunk, pending), Segments(self, wide)
        initial = loop.memory.start(x_TBD.shape[1])
        found, weights = over_chunks(loop.step, (layout.spread(tokens),), initial, layout, self.chunk, before)
        if self.watched and loop.writes is not None:
            self.collected = summary(weights, loop.writes)
        seen, read = layout.collect(found).chunk(2, -1)
        join = self.form(normed_and_joined)
        y_TBD = join(seen, self.norm_attention.weight, x_TBD.dtype)
        gate_TBD = join(read, self.norm_memory.weight, x_TBD.dtype)
        out = self.leave(self.output(self.form(gated)(gate_TBD, y_TBD, self.config.gate)))
        return out, ContextState(weights, layout.remaining(tokens), layout.left)

    def start(self, batch: int) -> ContextState:
        """The meta-learned initial weights, and nothing pending."""
        like = self.query.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        heads = like.shape[0] // self.head_dim
        waiting = like.new_zeros(batch, heads, 0, 4 * self.head_dim, dtype=dtype)
        return ContextState(self.network.memory(dtype).start(batch), waiting, NO_PENDING)

    def flops(self, length: int) -> Flops:
        """Per token, forward: the memory is read twice."""
        rule, head_dim, heads = self.rule, self.head_dim, self.query.weight.shape[0] // self.head_dim
        dense = 5 * self.query.flops().dense + heads * (5 * 2.0 * head_dim**2 + 2.0 * head_dim * self.rates.count)
        seen = min(self.chunk, length) + self.persistent  # two of each token, half of the square
        dense += heads * (6.0 if self.persistent else 4.0) * seen * head_dim
        hidden = rule.expansion * head_dim
        reads, writes = deep.flops(rule.depth, head_dim, hidden, rule.chunk, rule.momentum)
        recalled, _ = deep.flops(rule.depth, head_dim, hidden, 0, momentum=False)
        return Flops(dense + heads * (reads + recalled), heads * writes)

    def report(self) -> Report:
        """Of the memory, see `hope.mixers.long_term.summary`; histograms of the last segment."""
        return self.collected


class Segments:
    """The loop's body, with a layer's weights in the precision of its state.

    writes: what the last segment wrote.
    """

    def __init__(self, layer: MemoryAsContext, dtype: torch.dtype) -> None:
        self.layer, self.memory = layer, layer.network.memory(dtype)
        self.maps = {name: weight.to(dtype).mT for name, weight in layer.named_parameters(recurse=False)}
        self.writes: Writes | None = None

    def step(
        self, now: FastWeights, tensors: Sequence[Tensor | None], real: Tensor | None
    ) -> tuple[Tensor, FastWeights]:
        """One segment: y and M_t(.) [B, H, C, 2 K], side by side, and the state after it."""
        [tokens] = tensors
        assert tokens is not None
        q, k, v, recall = tokens.chunk(4, -1)
        y = self.attend(q, k, v, self.memory.read(now, recall))
        rates = self.layer.rates.of_heads(y)
        if real is not None:  # padding neither writes nor forgets
            rates = rates * real.unsqueeze(-1)
        keys, queries = unit(y @ self.maps["memory_key"]), unit(y @ self.maps["memory_query"])
        self.writes = Writes(keys, y @ self.maps["memory_value"], *self.layer.rates.named(rates))
        size, read = self.layer.rule.chunk, []
        cut = lambda t: [None] * (y.shape[2] // size) if t is None else t.split(size, 2)
        for query, valid, *written in zip(cut(queries), cut(real), *map(cut, self.writes), strict=True):
            now, reads = self.memory.write(now, Writes(*written), valid)
            read.append(self.memory.causal(reads, query))
        return torch.cat([y, torch.cat(read, 2)], -1), now

    def attend(self, q: Tensor, k: Tensor, v: Tensor, recalled: Tensor) -> Tensor:
        """Of every token to persistent keys, what is recalled up to it, and the segment up to it. [B, H, C, K]."""
        turn = rotation(q, self.layer.config.rope_base)
        both = [recalled @ self.maps["recalled_key"], k]
        keys, values = (
            torch.cat([rotated(t, *turn) for t in both], 2),
            torch.cat([recalled @ self.maps["recalled_value"], v], 2),
        )
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().repeat(1, 2)
        queries = rotated(q, *turn)
        if self.layer.persistent:
            queries, keys = apart_from_persistent(queries, keys, q)
            learned = F.pad(self.maps["persistent_keys"].mT, (q.shape[-1], 0)), self.maps["persistent_values"].mT
            keys, values, mask = with_always(keys, values, mask, learned)
        y: Tensor = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return y
