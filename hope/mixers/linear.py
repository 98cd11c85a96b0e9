"""The linear family as one mixer: linear attention, RetNet, SSD, DeltaNet, Gated DeltaNet and KDA are rows of the
table in `hope.memory.linear_config`. Around the memory (`hope.memory.linear`), per head with input z,

    q, k, v = W_q z, W_k z, W_v z     then, by the rule, silu(conv(.)); for q, k elu(.) + 1, unit length, rotation
    log a   = log(1 - 2^(-5-h))   |   -exp(A_h) softplus(w . z + b_h)   |   that per channel, with w of low rank
    b       = 1   |   sigmoid(w . z)   |   the softplus above
    o       = W_o (norm(W_t q_t [/ sum of weights] [+ D_h v_t]) * [silu or sigmoid of W_g z])

Trunk activations are [T, B, D]; inside, per head, [B, H, T, K]. The memory is fp32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import CausalConv, Linear, RMSNorm, gated, rotated, rotation
from hope.memory.kernels import linear_for
from hope.memory.linear_config import LinearConfig
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.mixers.vectors import heads_of, joined, keys_of, normed_and_joined, short_convolutions
from hope.parameters import constant, new_parameter, normal

EPSILON = 1e-6
"""Added to a sum of weights before it divides."""


@dataclass(frozen=True)
class LinearState(State):
    """What a sequence carries from one call to the next; fp32 (fp64 in tests).

    weight: [B, H, V, K]. With a normaliser, the last row of V holds the sum of keys.
    history: [B, taps-1, 3 D], the last inputs of the convolutions of q, k and v.
    position: of the next token, in tokens since the first call. Only differences count.
    """

    weight: Tensor
    history: Tensor
    position: int

    def compared(self) -> dict[str, Tensor]:
        """The memory."""
        return {"memory": self.weight}


def steps(logit: Tensor, bias: Tensor) -> Tensor:
    """softplus(logit + bias), in the bias's precision."""
    return F.softplus(logit.to(bias.dtype) + bias)


@mixer("linear", section=LinearConfig)
class LinearMemory(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memory."""

    def __init__(self, trunk: Trunk, config: LinearConfig) -> None:
        super().__init__()
        width, heads, head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.config, self.rule, self.head_dim = config, config.resolved(), head_dim
        self.chunk = config.chunk
        self.query, self.key, self.value = (Linear(width, width, "column", head_dim) for _ in range(3))
        if self.rule.conv_width:
            self.conv_query, self.conv_key, self.conv_value = (
                CausalConv(width, self.rule.conv_width) for _ in range(3)
            )
        gate = lambda *shape, init: new_parameter(*shape, init=init, cut=0, update="elementwise")
        if self.rule.decay == "channel":
            rank = config.decay_rank or head_dim
            # every rank has the narrow map, and uses it for its own heads
            init = normal(0.4 * width**-0.5)
            self.decay_down = new_parameter(rank, width, init=init, used="heads", update="matrix")
            self.decay_up = Linear(rank, width, "column", head_dim)
        if self.rule.decay == "head":
            self.decay_weight = gate(heads, width, init=normal(0.02))
        if self.rule.decay in ("head", "channel"):
            self.decay_rate = gate(heads, init=log_uniform(1.0, 16.0))
            self.decay_bias = gate(heads if self.rule.decay == "head" else width, init=step_bias)
        if self.rule.write == "beta":
            self.write_weight = gate(heads, width, init=normal(0.02))
        if self.rule.skip:
            self.skip = gate(heads, init=constant(1.0))
        if self.rule.head_norm:
            self.norm = RMSNorm(head_dim, used="heads")
        if self.rule.gate != "none":
            self.gate = Linear(width, width, "column")
        self.output = Linear(width, width, "row")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LinearState]:
        assert state is None or isinstance(state, LinearState)
        x_TBD = self.enter(x_TBD)
        before = self.start(x_TBD.shape[1]) if state is None else state
        q, k, v, history = self._vectors(x_TBD, before, documents)
        log_decay, write = self._gates(x_TBD, q)
        values = F.pad(v, (0, 1), value=1.0) if self.rule.normaliser else v
        memory = linear_for(self.config, x_TBD.device, x_TBD.dtype, self.head_dim).within(documents)
        y, weight = memory(q, k, values, log_decay, write, before.weight, erase=self.rule.erase, chunk=self.chunk)
        if self.watched:
            self.collected = summary(weight, log_decay, write)
        if self.rule.normaliser:
            y = y[..., :-1] / (y[..., -1:] + EPSILON)
        if self.rule.skip:
            y = y + self.skip.to(y.dtype)[:, None, None] * v
        after = LinearState(weight, history, before.position + x_TBD.shape[0])
        return self.leave(self.output(self._gated(y, x_TBD))), after

    def _vectors(
        self, x_TBD: Tensor, before: LinearState, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v [B, H, T, K], and the history after this call."""
        z_q, z_k, z_v, history = self._projected(x_TBD, before, documents)
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        choices = self.rule.feature_map == "elu1", self.rule.unit_keys
        q, k = (self.form(keys_of)(z, self.head_dim, wide, *choices) for z in (z_q, z_k))
        if self.rule.rope_base:
            turn = rotation(q, self.rule.rope_base, before.position)
            q, k = (self.form(rotated)(z, *turn) for z in (q, k))
        return q, k, self.form(heads_of)(z_v, self.head_dim, wide), history

    def _projected(
        self, x_TBD: Tensor, before: LinearState, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Projections of x, convolved if the rule says so [T, B, D], and the history after this call."""
        z_q, z_k, z_v = self.query(x_TBD), self.key(x_TBD), self.value(x_TBD)
        if not self.rule.conv_width:
            return z_q, z_k, z_v, before.history
        convolutions = self.conv_query, self.conv_key, self.conv_value
        (z_q, z_k, z_v), history = short_convolutions(convolutions, (z_q, z_k, z_v), before.history, documents)
        return z_q, z_k, z_v, history

    def _gates(self, x_TBD: Tensor, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """log a [B, H, T, 1 or K] and b [B, H, T], in the precision of `like` [B, H, T, K]."""
        rule, log_decay, step = self.rule, None, None
        if rule.decay == "constant":
            log_decay = fixed_decays(self.first_head, like.shape[1], like).expand(*like.shape[:3], 1)
        elif rule.decay != "none":
            down = F.linear(x_TBD, self.decay_weight if rule.decay == "head" else self.decay_down)
            logit = down if rule.decay == "head" else self.decay_up(down)
            step_TBN = self.form(steps)(logit, self.decay_bias.to(like.dtype))
            step = step_TBN.unflatten(-1, (like.shape[1], -1)).permute(1, 2, 0, 3)
            log_decay = -self.decay_rate.to(like.dtype).exp()[:, None, None] * step
        if rule.write == "step":
            assert step is not None
            return log_decay, step.squeeze(-1)
        if rule.write == "one":
            return log_decay, None
        logit = F.linear(x_TBD, self.write_weight).to(like.dtype)
        return log_decay, self.config.write_max * torch.sigmoid(logit).permute(1, 2, 0)

    def _gated(self, y_BHTK: Tensor, x_TBD: Tensor) -> Tensor:
        """Heads normed, side by side [T, B, D], and gated."""
        if self.rule.head_norm:
            y_TBD = self.form(normed_and_joined)(y_BHTK, self.norm.weight, x_TBD.dtype)
        else:
            y_TBD = joined(y_BHTK, x_TBD.dtype)
        if self.rule.gate == "none":
            return y_TBD
        return self.form(gated)(self.gate(x_TBD), y_TBD, self.rule.gate)

    def start(self, batch: int) -> LinearState:
        """Nothing in the memory, and no history."""
        like, head_dim = self.query.weight, self.head_dim
        dtype = torch.promote_types(like.dtype, torch.float32)
        rows = head_dim + self.rule.normaliser
        weight = like.new_zeros(batch, like.shape[0] // head_dim, rows, head_dim, dtype=dtype)
        past = max(0, self.rule.conv_width - 1)
        return LinearState(weight, like.new_zeros(batch, past, 3 * like.shape[0], dtype=dtype), 0)

    def flops(self, length: int) -> Flops:
        """Per token, forward, causal products inside chunks counting half of the square. Projections, convolutions,
        gates and reads as dense, what changes the memory as writes."""
        rule, width, head_dim = self.rule, self.query.weight.shape[1], self.head_dim
        maps = [self.query, self.key, self.value, self.output]
        maps += [self.gate] if rule.gate != "none" else []
        maps += [self.decay_up] if rule.decay == "channel" else []
        dense = sum((m.flops() for m in maps), Flops()).dense + 3 * 2.0 * width * rule.conv_width
        if rule.decay == "channel":
            dense += 2.0 * self.decay_down.numel()
        heads = width // head_dim
        dense += 2.0 * width * heads * ((rule.decay == "head") + (rule.write == "beta"))
        rows, keys, chunk = head_dim + rule.normaliser, head_dim, self.chunk
        reads = 2.0 * rows * keys + chunk * (keys + rows)
        writes = 2.0 * rows * keys
        if rule.erase:  # the system, its solution for values and keys, the product of each chunk's keys, and its use
            writes += chunk * (keys + rows + keys) + 2.0 * keys * keys + 2.0 * rows * keys * (1 + keys / chunk)
        return Flops(dense + heads * reads, heads * writes)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """The form of the loop over chunks, for rows of one document."""
        return str(linear_for(self.config, device, dtype, self.head_dim))

    def report(self) -> Report:
        """memory_norm: mean over sequences and heads of the Frobenius norm of the state. Histograms of what the rule
        has: decay [B, H, T, 1 or K], write [B, H, T]."""
        return self.collected


def fixed_decays(first: int, count: int, like: Tensor) -> Tensor:
    """log(1 - 2^(-5-h)) [count, 1, 1] of heads h = first, first + 1, ... (Sun et al., 2023, Eq. 8)."""
    heads = torch.arange(first, first + count, device=like.device, dtype=torch.float64)
    return torch.log1p(-torch.exp2(-5.0 - heads)).to(like.dtype)[:, None, None]


def log_uniform(low: float, high: float) -> Callable[[torch.Size, torch.Generator], Tensor]:
    """Logarithms of numbers that are uniform between `low` and `high`."""
    return lambda shape, generator: torch.log(low + (high - low) * torch.rand(shape, generator=generator))


def step_bias(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values whose softplus lies between 0.001 and 0.1, uniformly in the logarithm (Gu and Dao, 2023)."""
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


@torch.no_grad()
def summary(weight: Tensor, log_decay: Tensor | None, write: Tensor | None) -> Report:
    """What the log shows of a pass."""
    found = {"decay": None if log_decay is None else log_decay.exp(), "write": write}
    histograms = {name: t.detach() for name, t in found.items() if t is not None}
    return Report({"memory_norm": weight.float().square().sum((-1, -2)).sqrt().mean()}, histograms)
