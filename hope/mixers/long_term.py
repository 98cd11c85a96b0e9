"""The long-term memory of Titans and TTT per head, from the trunk's activations to what is read (`hope.memory.deep`):

    q, k, v = W_q z, W_k z, W_v z      then silu(conv(.)), q and k of unit length, as the rule says
    theta   = theta_max sigmoid(w . z + b)     eta = momentum_max sigmoid(w . z + b)     alpha = sigmoid(w . z + b)
    y_t     = M_t(q_t)

Mixers are made of it: alone (`hope.mixers.titans`), beside attention or before it (`hope.mixers.titans_attention`).
Memory states are fp32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.dense import Dense
from hope.documents import NO_PENDING, Documents, Pending, layout_of
from hope.flops import Flops
from hope.layers import CausalConv, Linear
from hope.memory import deep
from hope.memory.bank import State as FastWeights
from hope.memory.bank import reset_rows
from hope.memory.deep import DeepMemory, Writes, deep_memory
from hope.memory.titans_config import TitansConfig
from hope.mixers.base import Report, State, Trunk
from hope.mixers.vectors import heads_of, keys_of, short_convolutions
from hope.parameters import constant, new_parameter, normal


@dataclass(frozen=True)
class MemoryState(State):
    """What a sequence carries from one call to the next; fp32 (fp64 in tests).

    weights: of the memory's layers at the last chunk border, with their momentum.
    history: [B, taps-1, 3 D], the last inputs of the convolutions of q, k and v.
    waiting: [B, H, P, 3 K + R], q, k, v and the rates' logarithms of the tokens since that border.
    pending: how many of the P slots are taken.
    """

    weights: FastWeights
    history: Tensor
    waiting: Tensor
    pending: Pending

    def reset(self, rows: Tensor, initial: MemoryState) -> MemoryState:
        """Where rows [B] is true, a sequence starts anew: initial weights, no history, nothing pending."""
        history = self.history.masked_fill(rows.view(-1, 1, 1), 0.0)
        weights, pending = reset_rows(self.weights, initial.weights, rows), self.pending.without(rows)
        return dataclasses.replace(self, weights=weights, history=history, pending=pending)

    def compared(self) -> dict[str, Tensor]:
        """The memory's layers."""
        return {f"memory.{number}": layer.weight for number, layer in enumerate(self.weights)}


class LongTermMemory(Dense):
    """x [T, B, D], which has entered the region, -> (reads [B, H, T, K], state)."""

    def __init__(self, trunk: Trunk, config: TitansConfig) -> None:
        super().__init__()
        width, heads, head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.config, self.rule, self.head_dim = config, config.resolved(), head_dim
        self.chunk = self.rule.chunk
        self.query, self.key, self.value = (Linear(width, width, "column", head_dim) for _ in range(3))
        if self.rule.conv_width:
            self.conv_query, self.conv_key, self.conv_value = (
                CausalConv(width, self.rule.conv_width) for _ in range(3)
            )
        self.rates = Rates(heads, width, config, head_dim)
        self.network = Network(heads, head_dim, config)

    def forward(
        self, x_TBD: Tensor, state: MemoryState | None, documents: Documents | None
    ) -> tuple[Tensor, MemoryState, Writes]:
        """Reads, state, and what was written (for the log)."""
        before = self.start(x_TBD.shape[1]) if state is None else state
        tokens, history = self._tokens(x_TBD, before, documents)
        if before.pending.slots:
            tokens = torch.cat([before.waiting, tokens], 2)
        layout = layout_of(x_TBD, documents, self.chunk, before.pending)
        queries, writes = self._apart(layout.spread(tokens))
        memory = self.network.memory(tokens.dtype)
        weights = None if state is None else before.weights
        y, weights = deep_memory(memory, queries, writes, layout, self.chunk, weights)
        after = MemoryState(weights, history, layout.remaining(tokens), layout.left)
        return layout.collect(y), after, writes

    def _tokens(self, x_TBD: Tensor, before: MemoryState, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """All that the memory is brought, [B, H, T, 3 K + R], and the history after this call."""
        streams, history = [self.query(x_TBD), self.key(x_TBD), self.value(x_TBD)], before.history
        if self.rule.conv_width:
            convolutions = self.conv_query, self.conv_key, self.conv_value
            streams, history = short_convolutions(convolutions, streams, history, documents)
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        cut = self.form(keys_of)
        q, k = (cut(z, self.head_dim, wide, False, self.rule.unit_keys) for z in streams[:2])
        v = self.form(heads_of)(streams[2], self.head_dim, wide)
        return torch.cat([q, k, v, self.rates(x_TBD, wide)], -1), history

    def _apart(self, tokens: Tensor) -> tuple[Tensor, Writes]:
        """Queries, and what is written."""
        q, k, v, rates = tokens.split([*[self.head_dim] * 3, tokens.shape[-1] - 3 * self.head_dim], -1)
        return q, Writes(k, v, *self.rates.named(rates))

    def start(self, batch: int) -> MemoryState:
        """The meta-learned initial weights, and nothing pending."""
        like = self.query.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        weights = self.network.memory(dtype).start(batch)
        taps = max(0, self.rule.conv_width - 1)
        history = like.new_zeros(batch, taps, 3 * like.shape[0], dtype=dtype)
        width = 3 * self.head_dim + self.rates.count
        waiting = like.new_zeros(batch, like.shape[0] // self.head_dim, 0, width, dtype=dtype)
        return MemoryState(weights, history, waiting, NO_PENDING)

    def flops(self) -> Flops:
        """Per token, forward. Projections, convolutions, rates and reads as dense, what changes the memory as
        writes."""
        rule, heads, width = self.rule, self.query.weight.shape[0] // self.head_dim, self.query.weight.shape[1]
        dense = (self.query.flops() + self.key.flops() + self.value.flops()).dense
        dense += 3 * 2.0 * width * rule.conv_width + 2.0 * width * heads * self.rates.count
        hidden = rule.expansion * self.head_dim
        reads, writes = deep.flops(rule.depth, self.head_dim, hidden, self.chunk, rule.momentum)
        return Flops(dense + heads * reads, heads * writes)


class Rates(Dense):
    """theta and, if the rule has them, log(1 - alpha) and log eta, side by side: x [T, B, width] -> [B, H, T, R]."""

    def __init__(self, heads: int, width: int, config: TitansConfig, head_dim: int) -> None:
        super().__init__()
        rule = config.resolved()
        self.theta_max, self.momentum_max = config.theta_bound(head_dim), config.momentum_max
        self.decays, self.moves = rule.decay, rule.momentum
        new = lambda *shape, init: new_parameter(heads, *shape, init=init, cut=0, update="elementwise")
        weight, bias = lambda: new(width, init=normal(0.02)), lambda value: new(init=constant(value))
        self.theta_weight, self.theta_bias = weight(), bias(0.0)
        if self.decays:
            self.decay_weight, self.decay_bias = weight(), bias(config.decay_start)
        if self.moves:
            self.momentum_weight, self.momentum_bias = weight(), bias(0.0)

    @property
    def count(self) -> int:
        """R."""
        return 1 + self.decays + self.moves

    def forward(self, x_TBD: Tensor, dtype: torch.dtype) -> Tensor:
        return self._bounded(lambda weight: F.linear(x_TBD, weight).to(dtype).permute(1, 2, 0))

    def of_heads(self, y: Tensor) -> Tensor:
        """From what each head has, [B, H, T, K], where `width` is that of a head."""
        return self._bounded(lambda weight: (y @ weight.to(y.dtype).unsqueeze(-1)).squeeze(-1))

    def _bounded(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """project: a weight [H, width] -> products [B, H, T]."""

        def logit(weight: Tensor, bias: Tensor) -> Tensor:
            product = project(weight)
            return product + bias.to(product.dtype).unsqueeze(-1)

        found = [self.theta_max * torch.sigmoid(logit(self.theta_weight, self.theta_bias))]
        if self.decays:
            found.append(F.logsigmoid(-logit(self.decay_weight, self.decay_bias)))
        if self.moves:
            log_eta = F.logsigmoid(logit(self.momentum_weight, self.momentum_bias))
            found.append(log_eta + math.log(self.momentum_max))
        return torch.stack(found, -1)

    def named(self, rates: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """theta, log(1 - alpha) and log eta [B, H, L] of what `forward` gave."""
        parts = list(rates.unbind(-1))
        return parts.pop(0), parts.pop(0) if self.decays else None, parts.pop(0) if self.moves else None


class Network(Dense):
    """The memory's weights before the first token, per head: `layers.0` [H, F, K] to `layers.L-1` [H, K, F]."""

    def __init__(self, heads: int, head_dim: int, config: TitansConfig) -> None:
        super().__init__()
        self.rule = rule = config.resolved()
        widths = [head_dim, *[rule.expansion * head_dim] * (rule.depth - 1), head_dim]
        self.layers = torch.nn.ParameterList(
            new_parameter(heads, rows, columns, init=normal(columns**-0.5), cut=0, update="matrix_per_head")
            for columns, rows in itertools.pairwise(widths)
        )
        if rule.inner_norm:
            new = lambda value: new_parameter(heads, head_dim, init=constant(value), cut=0, update="elementwise")
            self.scale, self.shift = new(1.0), new(0.0)

    def memory(self, dtype: torch.dtype) -> DeepMemory:
        """Bound to these weights, in the precision of the state."""
        norm = (self.scale.to(dtype), self.shift.to(dtype)) if self.rule.inner_norm else None
        weights = tuple(w.to(dtype) for w in self.layers)
        return DeepMemory(weights, self.rule.activation, self.rule.residual, norm, self.rule.momentum)


@torch.no_grad()
def summary(weights: FastWeights, writes: Writes) -> Report:
    """What the log shows of a pass. memory_norm: mean over sequences and heads of the norm of all weights.
    Histograms theta, alpha and eta [B, H, L], of those that there are."""
    norm = torch.stack([layer.weight.float().square().sum((-1, -2)) for layer in weights]).sum(0).sqrt()
    histograms = {"theta": writes.theta.detach()}
    if writes.log_keep is not None:
        histograms["alpha"] = -torch.expm1(writes.log_keep.detach())
    if writes.log_momentum is not None:
        histograms["eta"] = writes.log_momentum.detach().exp()
    return Report({"memory_norm": norm.mean()}, histograms)
