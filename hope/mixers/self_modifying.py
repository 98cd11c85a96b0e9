"""Self-modifying Titans (Eq. 83-91), the mixer of HOPE: memories that produce their own keys, values, write rates and
targets.

For a head with normalised input x_t and query q_t, and c the contribution factor,

    k_t = unit(S_k x_t + c M_k(x_t))      v_t = unit(S_v x_t + c M_v(x_t))          S: the static path
    eta_t = eta_max sigmoid(8 w_eta . (x_t + c M_eta(x_t)) + b_eta)                 alpha_t alike, biased to ~1
    D_box <- D_box (alpha_t I - eta_t k_t k_t^T) - eta_t grad 1/2 |M_box(k_t) - M_box(v_t)|^2      for every box
    y_t = M_main(q_t),       M_box = M_box,0 + D_box (`forget: initial`; Eq. 88 itself has M_box for D_box: `zero`)

Reads of k, v, eta and alpha and all inner gradients use the state at the chunk's start (Eq. 90); y is read causally
inside the chunk by default. `hope.memory.scan` is the loop over chunks. Sequential depth is T / projection_chunk: k_t
depends on the state that k writes.

Trunk activations are [T, B, D]; inside, per head, [B, H, T, K]. Memory states are fp32 whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope.documents import NO_PENDING, Documents, Pending, of_open_document, plain_layout
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
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.parameters import constant, new_parameter, normal


@dataclass(frozen=True)
class SelfModifyingState(State):
    """What a sequence carries from one call to the next; fp32 (fp64 in tests).

    projections, main: fast weights of the two banks at the last chunk boundary (the same tuple when the chunk sizes are
        equal and writes are shared).
    history: [B, taps-1, 2 D], the last inputs of the two convolutions.
    pending_x, pending_q: [B, H, P, K], the memory's inputs since the last chunk boundary.
    pending: how many of the P slots are taken.
    """

    projections: FastWeights
    main: FastWeights
    history: Tensor
    pending_x: Tensor
    pending_q: Tensor
    pending: Pending

    def reset(self, rows: Tensor, initial: SelfModifyingState) -> SelfModifyingState:
        """Where rows [B] is true, a sequence starts anew: initial memories, no history, nothing pending."""
        bank = lambda now, start: reset_rows(now, start, rows)
        main = bank(self.main, initial.main)
        projections = main if self.projections is self.main else bank(self.projections, initial.projections)
        history = self.history.masked_fill(rows.view(-1, 1, 1), 0.0)
        pending = self.pending.without(rows)
        return SelfModifyingState(projections, main, history, self.pending_x, self.pending_q, pending)

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


def merge_heads(y_BHTK: Tensor, gate_TBD: Tensor, norm_weight: Tensor) -> Tensor:
    """Heads normed by one weight in the memory's precision, side by side [T, B, D] in the trunk's, and gated."""
    y_BHTK = rms_norm(y_BHTK, norm_weight.to(y_BHTK.dtype)).to(gate_TBD.dtype)
    return gated(gate_TBD, y_BHTK.permute(2, 0, 1, 3).flatten(-2))


@mixer("hope", section=MemoryConfig)
class SelfModifyingTitans(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memories."""

    def __init__(self, trunk: Trunk, config: MemoryConfig) -> None:
        super().__init__()
        width, heads, head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.config, self.width, self.head_dim, self.heads = config, width, head_dim, heads
        self.chunk = config.window
        self.boxes = ("k", "v", "eta", "alpha") + (("q",) if config.adaptive_query else ())
        self.input, self.query = (Linear(width, width, "column", head_dim) for _ in range(2))
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
        # small, not zero: a zero read-out would give the eta and alpha memories no gradient at the first step
        gate = lambda *shape, init: new_parameter(heads, *shape, init=init, cut=0, update="elementwise")
        self.eta_weight, self.alpha_weight = gate(head_dim, init=normal(0.02)), gate(head_dim, init=normal(0.02))
        self.eta_bias = gate(init=constant(0.0))
        self.alpha_bias = gate(init=constant(config.alpha_bias_start))
        self.norm = RMSNorm(head_dim, used="heads")
        self._collected = Report()

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, SelfModifyingState]:
        assert state is None or isinstance(state, SelfModifyingState)
        x_TBD = self.enter(x_TBD)
        length, batch, _ = x_TBD.shape
        dtype = torch.promote_types(x_TBD.dtype, torch.float32)
        choice = scan_for(self.config, x_TBD.device, x_TBD.dtype, self.head_dim)
        heads = heads_for(self.config, x_TBD.device, x_TBD.dtype, self.head_dim)
        x_BHTK, q_BHTK, history = self._convolved(x_TBD, state, documents, heads, choice.operands or dtype)
        pending = NO_PENDING if state is None else state.pending
        if state is not None and pending.slots:
            x_BHTK = torch.cat([state.pending_x, x_BHTK], 2)
            q_BHTK = torch.cat([state.pending_q, q_BHTK], 2)
        window, device = self.config.window, x_TBD.device
        layout = (
            plain_layout(batch, length, window, device, pending)
            if documents is None
            else documents.layout(window, pending)
        )
        before = None if state is None else States(state.projections, state.main)
        given = self._given(layout.spread(x_BHTK), layout.spread(q_BHTK))
        found = choice.scan(self.config, self._memories(dtype), given, layout, before)
        if self.watched:
            self._collected = summary(found)
        merge = heads.merge_heads or self.form(merge_heads)
        merged = merge(layout.collect(found.y), self.gate(x_TBD), self.norm.weight)
        out = self.leave(self.output(merged))
        left = layout.remaining(x_BHTK).to(dtype), layout.remaining(q_BHTK).to(dtype), layout.left
        return out, SelfModifyingState(found.states.projections, found.states.main, history, *left)

    def _convolved(
        self,
        x_TBD: Tensor,
        state: SelfModifyingState | None,
        documents: Documents | None,
        heads: HeadsChoice,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The memory's inputs x and q, unit vectors [B, H, T, K] of `dtype` each, and the history [B, taps-1, 2 D]."""
        width, past = self.conv_input.weight.shape[0], self.config.conv_width - 1  # of the heads that are here
        history = x_TBD.new_zeros(past, x_TBD.shape[1], 2 * width)
        if state is not None:
            history = state.history.transpose(0, 1)
        same = None if documents is None or past == 0 else documents.same(past + 1)
        cut = heads.memory_input or self.form(memory_input)
        found, latest = [], []
        halves = history[..., :width], history[..., width:]
        for project, conv, before in zip(
            (self.input, self.query), (self.conv_input, self.conv_query), halves, strict=True
        ):
            z = project(x_TBD)
            found.append(cut(z, conv.weight, before, same, self.head_dim, dtype))
            latest.append(conv.latest(z, before))
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        past_TBD = of_open_document(torch.cat(latest, -1).to(wide), documents)
        return found[0], found[1], past_TBD.transpose(0, 1)

    def _given(self, x: Tensor, q: Tensor) -> Given:
        """What the loop takes of the whole sequence, and of this module apart from its memories."""
        static_k = static_v = None
        if self.config.static == "learned":
            static_k, static_v = self.static_k, self.static_v
        return Given(x, q, static_k, static_v, self.eta_bias, self.alpha_bias)

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
        history = like.new_zeros(batch, self.config.conv_width - 1, 2 * like.shape[0], dtype=dtype)
        nothing = like.new_zeros(batch, like.shape[0] // self.head_dim, 0, self.head_dim, dtype=dtype)
        return SelfModifyingState(projections, main, history, nothing, nothing, NO_PENDING)

    def flops(self, length: int) -> Flops:
        """Per token, forward. Projections and convolutions, memory reads as dense; memory writes apart."""
        config, head_dim = self.config, self.head_dim
        dense = self.input.flops() + self.query.flops() + self.gate.flops() + self.output.flops()
        conv = 2 * 2.0 * self.width * config.conv_width
        static = 4.0 * self.width * head_dim if config.static == "learned" else 0.0
        reads, writes = self.memories.flops(len(self.boxes), config.projection_chunk, head_dim)
        return dense + Flops(conv + static + self.heads * reads, self.heads * writes)

    def report(self) -> Report:
        """memory_norm: mean over sequences and heads of the Frobenius norm of the main bank's state at the last chunk
        boundary (matrix: R). Histograms of eta and alpha [B, H, L]."""
        return self._collected

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
    return Report({"memory_norm": norm.mean()}, histograms)
