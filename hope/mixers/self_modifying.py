"""Self-modifying Titans (Eq. 83-91), the mixer of HOPE: memories that produce their own keys, values, write rates and
targets.

For a head with normalised input x_t and query q_t, and c the contribution factor,

    k_t = unit(S_k x_t + c M_k(x_t))      v_t = unit(S_v x_t + c M_v(x_t))          S x_t: the static path
    eta_t = eta_max sigmoid(8 w_eta . (x_t + c M_eta(x_t)) + b_eta)                 alpha_t alike, biased to ~1
    D_box <- D_box (alpha_t I - eta_t k_t k_t^T) - eta_t grad 1/2 |M_box(k_t) - M_box(v_t)|^2      for every box
    y_t = M_main(q_t),       M_box = M_box,0 + D_box (`forget: initial`; Eq. 88 itself has M_box for D_box: `zero`)

With `static: projected` the static paths are s_k,t and s_v,t in the place of S_k x_t and S_v x_t. They are made as x_t
and q_t are, unit(silu(conv(W z))), by projections W_k, W_v and convolutions of their own, as in Gated DeltaNet (Yang et
al., 2025).

With `self_made: not_k` k has no M_k, and so on.

With `erase_max` a gate of its own, alpha_t erase_max sigmoid(8 w_erase . x_t + b_erase), erases in the place of eta_t.

Reads of k, v, eta and alpha and all inner gradients use the state at the chunk's start (Eq. 90); y is read causally
inside the chunk by default. `hope.memory.scan` is the loop over chunks. Sequential depth is T / projection_chunk: k_t
depends on the state that k writes.

Trunk activations are [T, B, D]; inside, per head, [B, H, T, K]. Memory states are fp32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hope.documents import NO_PENDING, Documents, Pending, layout_of, of_open_document
from hope.flops import Flops
from hope.heads.kernels import HeadsChoice, heads_for
from hope.layers import CausalConv, Linear, RMSNorm, convolved, gated, rms_norm, unit
from hope.memory.bank import State as FastWeights
from hope.memory.bank import reset_rows
from hope.memory.config import MemoryConfig
from hope.memory.kernels import scan_for
from hope.memory.matrix import MatrixMemories
from hope.memory.mlp import MlpMemories
from hope.memory.scan import Given, Memories, Scanned, States, join_gates
from hope.memory.two_layer.ops import GROUP
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.parameters import constant, new_parameter, normal, spread


@dataclass(frozen=True)
class SelfModifyingState(State):
    """What a sequence carries from one call to the next; fp32 (fp64 in tests).

    projections, main: fast weights of the two banks at the last chunk boundary (the same tuple when the chunk sizes are
        equal and writes are shared).
    history: [B, taps-1, N D], the last inputs of the N convolutions: of x, q and, if projected, k and v.
    pending_x, pending_q: [B, H, P, K], the memory's inputs since the last chunk boundary.
    pending: how many of the P slots are taken.
    pending_k, pending_v: [B, H, P, K], the static paths of the same tokens; None unless they are projected.
    """

    projections: FastWeights
    main: FastWeights
    history: Tensor
    pending_x: Tensor
    pending_q: Tensor
    pending: Pending
    pending_k: Tensor | None = None
    pending_v: Tensor | None = None

    @property
    def waiting(self) -> list[Tensor]:
        """What the memory was brought for the pending tokens, in the order of `SelfModifyingTitans._streams`."""
        return [t for t in (self.pending_x, self.pending_q, self.pending_k, self.pending_v) if t is not None]

    def reset(self, rows: Tensor, initial: SelfModifyingState) -> SelfModifyingState:
        """Where rows [B] is true, a sequence starts anew: initial memories, no history, nothing pending."""
        bank = lambda now, start: reset_rows(now, start, rows)
        main = bank(self.main, initial.main)
        projections = main if self.projections is self.main else bank(self.projections, initial.projections)
        history = self.history.masked_fill(rows.view(-1, 1, 1), 0.0)
        pending = self.pending.without(rows)
        return dataclasses.replace(self, projections=projections, main=main, history=history, pending=pending)

    def compared(self) -> dict[str, Tensor]:
        """The fast weights of the main memory's bank."""
        return {f"main.{number}": layer.weight for number, layer in enumerate(self.main)}


def memory_input(
    x_TBD: Tensor, weight: Tensor, history: Tensor, same: Tensor | None, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Convolved and cut into heads of unit length [B, H, T, K], normalised in fp32 (or fp64). One of fewer bits than
    that lies without gaps, as the kernels take it."""
    heads = convolved(x_TBD, weight, history, same).unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)
    wide = torch.promote_types(x_TBD.dtype, torch.float32)
    vectors = unit(heads.to(wide))
    return vectors if dtype == wide else vectors.to(dtype, memory_format=torch.contiguous_format)


def merge_heads(
    y_BHTK: Tensor, gate_TBD: Tensor, norm_weight: Tensor, kind: Literal["silu", "sigmoid"] = "silu"
) -> Tensor:
    """Heads normed by one weight in the memory's precision, side by side [T, B, D] in the trunk's, and gated."""
    y_BHTK = rms_norm(y_BHTK, norm_weight.to(y_BHTK.dtype)).to(gate_TBD.dtype)
    return gated(gate_TBD, y_BHTK.permute(2, 0, 1, 3).flatten(-2), kind)


@mixer("hope", section=MemoryConfig)
class SelfModifyingTitans(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memories."""

    def __init__(self, trunk: Trunk, config: MemoryConfig) -> None:
        super().__init__()
        width, heads, head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.config, self.width, self.head_dim, self.heads = config, width, head_dim, heads
        self.chunk = config.window
        if config.memory == "mlp":
            self.period = GROUP
        self.boxes = config.boxes
        projection = lambda: Linear(width, width, "column", head_dim)
        self.input, self.query = projection(), projection()
        self.gate = Linear(width, width, "column")
        self.output = Linear(width, width, "row")
        self.conv_input = CausalConv(width, config.conv_width)
        self.conv_query = CausalConv(width, config.conv_width)
        kind = MatrixMemories if config.memory == "matrix" else MlpMemories
        self.memories = kind((*self.boxes, "main"), heads, head_dim, config)
        if config.static == "learned":
            square = lambda: new_parameter(
                heads, head_dim, head_dim, init=normal(head_dim**-0.5), cut=0, update="matrix_per_head"
            )
            self.static_k, self.static_v = square(), square()
        elif config.static == "projected":
            self.key, self.value = projection(), projection()
            self.conv_key, self.conv_value = (CausalConv(width, config.conv_width) for _ in range(2))
        # small, not zero: a zero read-out would give the eta and alpha memories no gradient at the first step
        gate = lambda *shape, init: new_parameter(heads, *shape, init=init, cut=0, update="elementwise")
        self.eta_weight, self.alpha_weight = gate(head_dim, init=normal(0.02)), gate(head_dim, init=normal(0.02))
        self.eta_bias = gate(init=constant(0.0))
        start = config.alpha_bias_start
        self.alpha_bias = gate(init=spread(start - config.alpha_spread, start + config.alpha_spread))
        apart = config.erase_max is not None
        self.erase_weight = gate(head_dim, init=normal(0.02)) if apart else None
        self.erase_bias = gate(init=constant(0.0)) if apart else None
        self.norm = RMSNorm(head_dim, used="heads")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        assert state is None or isinstance(state, SelfModifyingState)
        x_TBD = self.enter(x_TBD)
        dtype = torch.promote_types(x_TBD.dtype, torch.float32)
        choice = scan_for(self.config, x_TBD.device, x_TBD.dtype, self.head_dim)
        heads = heads_for(self.config, x_TBD.device, x_TBD.dtype, self.head_dim)
        inputs, history = self._convolved(x_TBD, state, documents, heads, choice.operands or dtype)
        pending = NO_PENDING if state is None else state.pending
        if state is not None and pending.slots:
            inputs = [torch.cat(pair, 2) for pair in zip(state.waiting, inputs, strict=True)]
        layout = layout_of(x_TBD, documents, self.config.window, pending)
        before = None if state is None else States(state.projections, state.main)
        given = self._given(*map(layout.spread, inputs))
        found = choice.scan(self.config, self._memories(dtype), given, layout, before)
        if self.watched:
            self.collected = summary(found)
        merge = heads.merge_heads or self.form(merge_heads)
        merged = merge(layout.collect(found.y), self.gate(x_TBD), self.norm.weight, self.config.output_gate)
        out = self.leave(self.output(merged))
        x, q, *static = (layout.remaining(t).to(dtype) for t in inputs)
        return out, SelfModifyingState(*found.states, history, x, q, layout.left, *static)

    def _streams(self) -> list[tuple[Linear, CausalConv]]:
        """What makes x, q and, if the static paths are projected, those of k and v."""
        streams = [(self.input, self.conv_input), (self.query, self.conv_query)]
        if self.config.static == "projected":
            streams += [(self.key, self.conv_key), (self.value, self.conv_value)]
        return streams

    def _convolved(
        self,
        x_TBD: Tensor,
        state: SelfModifyingState | None,
        documents: Documents | None,
        heads: HeadsChoice,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], Tensor]:
        """Of every stream unit vectors [B, H, T, K] of `dtype`, and the history [B, taps-1, N D]."""
        streams = self._streams()
        width, past = self.conv_input.weight.shape[0], self.config.conv_width - 1  # of the heads that are here
        history = x_TBD.new_zeros(past, x_TBD.shape[1], len(streams) * width)
        if state is not None:
            history = state.history.transpose(0, 1)
        same = None if documents is None or past == 0 else documents.same(past + 1)
        cut = heads.memory_input or self.form(memory_input)
        found, latest = [], []
        for (project, conv), before in zip(streams, history.split(width, -1), strict=True):
            z = project(x_TBD)
            found.append(cut(z, conv.weight, before, same, self.head_dim, dtype))
            latest.append(conv.latest(z, before))
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        past_TBD = of_open_document(torch.cat(latest, -1).to(wide), documents)
        return found, past_TBD.transpose(0, 1)

    def _given(self, x: Tensor, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Given:
        """What the loop takes of the whole sequence, and of this module apart from its memories."""
        static_k = static_v = None
        if self.config.static == "learned":
            static_k, static_v = self.static_k, self.static_v
        biases = self.eta_bias, self.alpha_bias
        return Given(x, q, static_k, static_v, *biases, k, v, self.erase_weight, self.erase_bias)

    def _memories(self, dtype: torch.dtype) -> Memories:
        """With equal chunk sizes one bank holds every memory, and is written once."""
        if self.config.projection_chunk == self.config.main_chunk:
            bank = self.memories.bank((*self.boxes, "main"), dtype)
            return Memories(bank, bank, self.eta_weight, self.alpha_weight)
        projections, main = self.memories.bank(self.boxes, dtype), self.memories.bank(("main",), dtype)
        return Memories(projections, main, self.eta_weight, self.alpha_weight)

    def start(self, batch: int) -> SelfModifyingState:
        """The meta-learned initial states, and nothing pending."""
        like = self.conv_input.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        memories = self._memories(dtype)
        main = memories.main.start(batch)
        projections = main if memories.shared else memories.projections.start(batch)
        streams = len(self._streams())
        history = like.new_zeros(batch, self.config.conv_width - 1, streams * like.shape[0], dtype=dtype)
        x, q, *static = [like.new_zeros(batch, like.shape[0] // self.head_dim, 0, self.head_dim, dtype=dtype)] * streams
        return SelfModifyingState(projections, main, history, x, q, NO_PENDING, *static)

    def flops(self, length: int) -> Flops:
        """Per token, forward. Projections and convolutions, memory reads as dense; memory writes apart."""
        config, head_dim = self.config, self.head_dim
        streams = self._streams()
        dense = sum((project.flops() for project, _ in streams), self.gate.flops() + self.output.flops())
        conv = len(streams) * 2.0 * self.width * config.conv_width
        static = 4.0 * self.width * head_dim if config.static == "learned" else 0.0
        reads, writes = self.memories.flops(len(self.boxes), config.projection_chunk, head_dim)
        return dense + Flops(conv + static + self.heads * reads, self.heads * writes)

    def report(self) -> Report:
        """memory_norm: mean over sequences and heads of the Frobenius norm of the main bank's state at the last chunk
        boundary (matrix: R). Histograms of eta and alpha, and of an erase rate of its own [B, H, L]."""
        return self.collected

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """The form of the memory loop, and that of what is around it where it is another."""
        loop, heads = (find(self.config, device, dtype, self.head_dim) for find in (scan_for, heads_for))
        return str(loop) if loop.name == heads.name else f"{loop}, heads {heads}"


@torch.no_grad()
def summary(found: Scanned) -> Report:
    """What the log shows of a pass."""
    gates = join_gates(found.gates)
    norm = torch.stack([s.weight.float().square().flatten(2).sum(-1) for s in found.states.main]).sum(0).sqrt()
    histograms = {"eta": gates.eta.detach(), "alpha": gates.log_alpha.detach().exp()}
    if gates.erase is not None:
        histograms["erase"] = gates.erase.detach()
    return Report({"memory_norm": norm.mean()}, histograms)
