"""Mamba-2 by its published parameterisation (Dao and Gu, 2024, "Transformers are SSMs", Sections 5 to 7). An inner
width I = expand D in heads of width P, and a state of N numbers for each of their features. With input z,

    g, x = W_g z, W_x z                  B, C = W_B z, W_C z       [G, N]: one B and C for all heads of a group
    x, B, C = silu(conv(x, B, C))        depthwise, causal, with a bias
    dt   = softplus(w . z + c)           a = exp(-exp(A) dt)       numbers per head
    S_t  = a_t S_t-1 + dt_t x_t B_t^T    y_t = S_t C_t + D x_t
    o    = W_o norm(y * silu(g))         the root mean square is that of all heads of a group

C is called a query here, B a key and x a value, as in the other mixers. Trunk activations are [T, B, D]; inside, per
head, [B, H, T, N or P]. The memory is fp32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import CausalConv, Linear
from hope.memory.kernels import LinearChoice, shared_keys_for
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.mixers.linear import LinearState, log_uniform, step_bias, steps, summary
from hope.mixers.vectors import heads_of, joined, short_convolutions
from hope.parameters import constant, new_parameter, normal
from hope.sections import MixerSection, Problem

EPSILON = 1e-5
"""Added to the mean square in the norm, as published."""


@dataclass
class Mamba2Config(MixerSection):
    """Dao and Gu, 2024, Transformers are SSMs."""

    expand: int = 2
    """Heads per head of the model, all as wide as those: the inner width is this times model.width."""
    state: int = 128
    """N: width of B and C, and so numbers that a head carries for each of its features."""
    groups: int = 1
    """Groups of heads that share B and C, and whose outputs are normed together. With 1 every tensor-parallel rank
    makes the same B and C. Otherwise the groups are divided over the ranks, of which they must be a multiple."""
    conv_width: int = 4
    """Taps of the causal depthwise convolutions with silu on x, B and C."""
    chunk: int = 64
    """Tokens that are computed together. Changes speed and rounding, not the result."""
    kernel: Literal["auto", "plain"] = "auto"
    """Form of the loop over chunks. auto: Triton kernels on a GPU in bf16 for heads of 64 or 128, a state that is a
    multiple of their width, and chunk 64, where rows are one document; plain: PyTorch everywhere."""

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        for key, works in (("expand", 2), ("state", 128), ("groups", 1), ("conv_width", 4), ("chunk", 64)):
            if getattr(self, key) < 1:
                yield Problem(f"{path}.{key}", f"{getattr(self, key)} is less than 1", f"{works}")

    def problems_of_heads(self, path: str, heads: int) -> Iterator[Problem]:
        inner = self.expand * heads
        if min(inner, self.groups) >= 1 and inner % self.groups:
            fits = ", ".join(str(n) for n in range(1, inner + 1) if inner % n == 0)
            what = f"{self.groups} groups do not divide {inner} heads (expand {self.expand} x model.heads {heads})"
            yield Problem(f"{path}.groups", what, fits)

    def divided(self) -> Iterator[tuple[str, int]]:
        if self.groups > 1:
            yield "groups", self.groups


def gated_squares(y_BHTP: Tensor, gate_TBI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """y * silu(gate), heads side by side [T, B, I] in y's precision, and its sums of squares per group [T, B, G]."""
    u_TBI = joined(y_BHTP, y_BHTP.dtype) * F.silu(gate_TBI.to(y_BHTP.dtype))
    return u_TBI, u_TBI.unflatten(-1, (groups, -1)).square().sum(-1)


def normed(u_TBI: Tensor, squares_TBG: Tensor, weight: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """u over the root mean square of its group, which has `size` features on all ranks together."""
    scale = torch.rsqrt(squares_TBG / size + EPSILON).unsqueeze(-1)
    y_TBI: Tensor = (u_TBI.unflatten(-1, (squares_TBG.shape[-1], -1)) * scale).flatten(-2)
    return (y_TBI * weight.to(u_TBI.dtype)).to(dtype)


@mixer("mamba2", section=Mamba2Config)
class Mamba2(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state)."""

    def __init__(self, trunk: Trunk, config: Mamba2Config) -> None:
        super().__init__()
        width, heads, taps = trunk.width, config.expand * trunk.heads, config.conv_width
        self.config, self.head_dim, self.chunk = config, trunk.head_dim, config.chunk
        inner, keys = heads * self.head_dim, config.groups * config.state
        shared = config.groups == 1
        self.value, self.gate = Linear(width, inner, "column", self.head_dim), Linear(width, inner, "column")
        self.key, self.query = (Linear(width, keys, "copy" if shared else "column", config.state) for _ in range(2))
        self.conv_value = CausalConv(inner, taps, drawn=True)
        self.conv_key, self.conv_query = (CausalConv(keys, taps, drawn=True, copy=shared) for _ in range(2))
        per_head = lambda *shape, init: new_parameter(*shape, init=init, cut=0, update="elementwise")
        self.step_weight = per_head(heads, width, init=normal(0.4 * width**-0.5))
        self.step_bias = per_head(heads, init=step_bias)
        self.decay_rate = per_head(heads, init=log_uniform(1.0, 16.0))
        self.skip = per_head(heads, init=constant(1.0))
        self.norm_weight = per_head(inner, init=constant(1.0))
        self.output = Linear(inner, width, "row")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, LinearState]:
        assert state is None or isinstance(state, LinearState)
        x_TBD = self.enter(x_TBD)
        before = self.start(x_TBD.shape[1]) if state is None else state
        q, k, v, history = self._vectors(x_TBD, before, documents)
        logit = F.linear(x_TBD, self.step_weight)
        step = self.form(steps)(logit, self.step_bias.to(v.dtype)).permute(1, 2, 0)
        log_decay = -(self.decay_rate.to(v.dtype).exp()[:, None] * step).unsqueeze(-1)
        memory = self._choice(x_TBD.device, x_TBD.dtype).within(documents)
        y, weight = memory(q, k, v, log_decay, step, before.weight, erase=False, chunk=self.chunk)
        if self.watched:
            self.collected = summary(weight, log_decay, step)
        y = y + self.skip.to(v.dtype)[:, None, None] * v
        after = LinearState(weight, history, before.position + x_TBD.shape[0])
        return self.leave(self.output(self._normed(y, x_TBD))), after

    def _vectors(
        self, x_TBD: Tensor, before: LinearState, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C and B [B, H, T, N], x [B, H, T, P], and the history after this call."""
        streams = self.value(x_TBD), self.key(x_TBD), self.query(x_TBD)
        convolutions = self.conv_value, self.conv_key, self.conv_query
        (z_v, z_k, z_q), history = short_convolutions(convolutions, streams, before.history, documents)
        wide, cut = torch.promote_types(x_TBD.dtype, torch.float32), self.form(heads_of)
        v = cut(z_v, self.head_dim, wide)
        q, k = (cut(z, self.config.state, wide) for z in (z_q, z_k))
        alike = v.shape[1] // k.shape[1]  # heads of a group
        q, k = (z.unsqueeze(2).expand(-1, -1, alike, -1, -1).flatten(1, 2) for z in (q, k))
        return q, k, v, history

    def _normed(self, y_BHTP: Tensor, x_TBD: Tensor) -> Tensor:
        """Gated and normed, heads side by side [T, B, I]."""
        groups = self.key.weight.shape[0] // self.config.state  # those of this rank
        u_TBI, squares_TBG = self.form(gated_squares)(y_BHTP, self.gate(x_TBD), groups)
        if self.config.groups == 1:
            squares_TBG = self.total(squares_TBG)
        size = self.config.expand * x_TBD.shape[-1] // self.config.groups
        return self.form(normed)(u_TBI, squares_TBG, self.norm_weight, size, x_TBD.dtype)

    def start(self, batch: int) -> LinearState:
        """Nothing in the memory, and no history."""
        like, config = self.value.weight, self.config
        dtype = torch.promote_types(like.dtype, torch.float32)
        heads, inner = like.shape[0] // self.head_dim, like.shape[0]
        weight = like.new_zeros(batch, heads, self.head_dim, config.state, dtype=dtype)
        streams = inner + 2 * self.key.weight.shape[0]
        return LinearState(weight, like.new_zeros(batch, config.conv_width - 1, streams, dtype=dtype), 0)

    def flops(self, length: int) -> Flops:
        """Per token, forward, causal products inside chunks counting half of the square."""
        maps = self.value, self.gate, self.key, self.query, self.output
        dense = sum((m.flops() for m in maps), Flops()).dense + 2.0 * self.step_weight.numel()
        dense += 2.0 * sum(conv.weight.numel() for conv in (self.conv_value, self.conv_key, self.conv_query))
        heads, rows, keys = self.step_weight.shape[0], self.head_dim, self.config.state
        square = 2.0 * rows * keys
        return Flops(dense + heads * (square + self.chunk * (keys + rows)), heads * square)

    def _choice(self, device: torch.device, dtype: torch.dtype) -> LinearChoice:
        return shared_keys_for(self.config.kernel, self.chunk, device, dtype, self.head_dim, self.config.state)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """The form of the loop over chunks, for rows of one document."""
        return str(self._choice(device, dtype))

    def report(self) -> Report:
        """See `hope.mixers.linear.summary`."""
        return self.collected
