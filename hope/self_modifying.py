"""Self-modifying Titans (Eq. 83-91): memories that produce their own keys, values, write rates and targets.

For a head with normalised input x_t and query q_t, and c the contribution factor,

    k_t = unit(S_k x_t + c M_k(x_t))      v_t = unit(S_v x_t + c M_v(x_t))          S: the static path
    eta_t = eta_max sigmoid(8 w_eta . (x_t + c M_eta(x_t)) + b_eta)                 alpha_t alike, biased to ~1
    M_box <- M_box (alpha_t I - eta_t k_t k_t^T) - eta_t grad 1/2 |M_box(k_t) - M_box(v_t)|^2      for every box
    y_t = M_main(q_t)

Reads of k, v, eta and alpha and all inner gradients use the state at the chunk's start (Eq. 90); y is read causally
inside the chunk by default. Sequential depth is T / projection_chunk: k_t depends on the state that k writes.

Trunk activations are [T, B, D]; inside, per head, [B, H, T, K]. Memory states are fp32 whatever the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.config import ModelConfig
from hope.documents import ChunkLayout, Documents, plain_layout
from hope.flops import Flops
from hope.layers import CausalConv, Linear, RMSNorm, constant, new_parameter, normal, unit
from hope.memory.bank import Bank, ChunkReads, State, reset_rows
from hope.memory.delta import Gates
from hope.memory.matrix import MatrixMemories
from hope.memory.mlp import MlpMemories

# read-outs start near 0 with unit-norm inputs; 8 lets a gate travel its range with weights of ordinary size
GATE_SCALE = 8.0


@dataclass(frozen=True)
class MixerState:
    """What a sequence carries from one call to the next; fp32.

    projections, main: states of the two banks (the same tuple when the chunk sizes are equal and writes are shared).
    history: [taps-1, B, 2 D] last inputs of the two convolutions.
    """

    projections: State
    main: State
    history: Tensor

    def detach(self) -> "MixerState":
        """The same values with no gradient to the past (truncated backpropagation between calls)."""
        cut = lambda state: tuple(type(s)(s.weight.detach(), None if s.momentum is None else s.momentum.detach())
                                  for s in state)  # fmt: skip
        return MixerState(cut(self.projections), cut(self.main), self.history.detach())


@dataclass
class GateStatistics:
    """Detached eta and alpha [B, H, T] and the Frobenius norm of the end state [B, H] of the bank that
    holds the main memory (matrix: P and R), for logging."""

    eta: Tensor
    alpha: Tensor
    state_norm: Tensor


class SelfModifyingTitans(nn.Module):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memories."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.memory_config = config, config.memory
        width, heads, head_dim = config.width, config.heads, config.head_dim
        memory = config.memory
        self.boxes = ("k", "v", "eta", "alpha") + (("q",) if memory.adaptive_query else ())
        self.input, self.query, self.gate = Linear(width, width), Linear(width, width), Linear(width, width)
        self.output = Linear(width, width)
        self.conv_input = CausalConv(width, memory.conv_width)
        self.conv_query = CausalConv(width, memory.conv_width)
        kind = MatrixMemories if memory.kind == "matrix" else MlpMemories
        self.memories = kind((*self.boxes, "main"), heads, head_dim, memory)
        if memory.static == "learned":
            self.static_k = new_parameter(heads, head_dim, head_dim, init=normal(head_dim**-0.5))
            self.static_v = new_parameter(heads, head_dim, head_dim, init=normal(head_dim**-0.5))
        # small, not zero: a zero read-out would give the eta and alpha memories no gradient at the first step
        self.eta_weight = new_parameter(heads, head_dim, init=normal(0.02))
        self.alpha_weight = new_parameter(heads, head_dim, init=normal(0.02))
        self.eta_bias = new_parameter(heads, init=constant(0.0))
        self.alpha_bias = new_parameter(heads, init=constant(memory.alpha_bias_start))
        self.norm = RMSNorm(head_dim)
        self.enter, self.leave = nn.Identity(), nn.Identity()
        self.statistics: GateStatistics | None = None
        self.collect_statistics = False

    def forward(
        self, x_TBD: Tensor, state: MixerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MixerState]:
        x_TBD = self.enter(x_TBD)
        length, batch, _ = x_TBD.shape
        width = self.conv_input.weight.shape[0]  # of the heads that are here
        past = self.memory_config.conv_width - 1
        history = x_TBD.new_zeros(past, batch, 2 * width) if state is None else state.history
        same = None if documents is None or past == 0 else documents.same(past + 1)
        xs, past_x = self.conv_input(self.input(x_TBD), history[..., :width], same)
        qs, past_q = self.conv_query(self.query(x_TBD), history[..., width:], same)
        dtype = torch.promote_types(x_TBD.dtype, torch.float32)
        window = self.memory_config.window
        layout = plain_layout(batch, length, window, x_TBD.device) if documents is None else documents.layout(window)
        x_BHLK, q_BHLK = (layout.spread(unit(self._heads(z).to(dtype))) for z in (xs, qs))
        y_BHLK, projections, main = self._memory_loop(x_BHLK, q_BHLK, layout, state)
        y_BHTK = self.norm_heads(layout.collect(y_BHLK)).to(x_TBD.dtype)
        merged = y_BHTK.permute(2, 0, 1, 3).flatten(-2)
        out = self.leave(self.output(merged * F.silu(self.gate(x_TBD))))
        return out, MixerState(projections, main, torch.cat([past_x, past_q], -1).to(dtype))

    def norm_heads(self, y: Tensor) -> Tensor:
        """One norm weight for all heads, applied per head in the memory's precision."""
        return F.rms_norm(y, (y.shape[-1],), self.norm.weight.to(y.dtype), eps=1e-6)

    def _heads(self, x_TBD: Tensor) -> Tensor:
        return x_TBD.unflatten(-1, (-1, self.config.head_dim)).permute(1, 2, 0, 3)

    def _static(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Static path of k and v for the whole sequence at once, [B, H, L, K] each."""
        if self.memory_config.static == "learned":
            return x @ self.static_k.to(x.dtype).mT, x @ self.static_v.to(x.dtype).mT
        if self.memory_config.static == "identity":
            return x, x
        return torch.zeros_like(x), torch.zeros_like(x)

    def _memory_loop(
        self, x: Tensor, q: Tensor, layout: ChunkLayout, state: MixerState | None
    ) -> tuple[Tensor, State, State]:
        """x, q [B, H, L, K] with L a multiple of the window -> y [B, H, L, K] and the end states."""
        config, batch, dtype = self.memory_config, x.shape[0], x.dtype
        shared = config.projection_chunk == config.main_chunk
        banks = self._banks(dtype, shared)
        initial = (banks[0].start(batch), banks[1].start(batch))
        now = initial if state is None else (state.projections, state.main)
        # whatever does not depend on the state is computed here for all chunks at once
        sequence = (x, q, *self._static(x), *self._static_gates(x))
        # cut into windows by unbind: slices inside the loop would make the backward quadratic in the number of chunks
        windows = zip(*(_cut(t, config.window) for t in sequence), strict=True)
        valid = [None] * (layout.padded // config.window)
        if layout.valid is not None:
            valid = list(layout.valid.to(dtype).unsqueeze(1).unflatten(-1, (-1, config.window)).unbind(2))
        outputs, gates = [], []
        for index, (tensors, real) in enumerate(zip(windows, valid, strict=True)):
            if layout.resets is not None:
                rows = layout.resets[:, index]
                now = (reset_rows(now[0], initial[0], rows), reset_rows(now[1], initial[1], rows))
            features, now, used = self._window(banks, now, tensors, real, shared)
            outputs.append(features)
            gates.append(used)
        if self.collect_statistics:
            self.statistics = self._summarise(banks[1], now[1], gates)
        return banks[1].output(torch.cat(outputs, 2)), now[0], now[1]

    def _banks(self, dtype: torch.dtype, shared: bool) -> tuple[Bank, Bank]:
        """With equal chunk sizes one bank holds every memory, and is written once."""
        if shared:
            bank = self.memories.bank((*self.boxes, "main"), dtype)
            return bank, bank
        return self.memories.bank(self.boxes, dtype), self.memories.bank(("main",), dtype)

    def _window(
        self,
        banks: tuple[Bank, Bank],
        now: tuple[State, State],
        tensors: Sequence[Tensor],
        valid: Tensor | None,
        shared: bool,
    ) -> tuple[Tensor, tuple[State, State], Gates]:
        """One window: all projection chunks in it, then all main chunks in it. Returns features, states, gates."""
        config = self.memory_config
        parts = [_cut(t, config.projection_chunk) for t in tensors]
        masks = [None] * len(parts[0]) if valid is None else _cut(valid.unsqueeze(-1), config.projection_chunk)
        projections, main = now
        keys: list[Tensor] = []
        values: list[Tensor] = []
        queries: list[Tensor] = []
        gates: list[Gates] = []
        features: list[Tensor] = []
        for *chunk, mask in zip(*parts, masks, strict=True):
            k, v, q, used = self._project(banks[0], projections, chunk, mask)
            before = projections
            projections, reads = banks[0].write(before, k, v, used)
            if shared:
                features.append(self._read_main(banks[0], before, reads, q))
            keys.append(k)
            values.append(v)
            queries.append(q)
            gates.append(used)
        joined = _join_gates(gates)
        if shared:
            return torch.cat(features, 2), (projections, projections), joined
        cut = lambda made: _cut(torch.cat(made, 2), config.main_chunk)
        main_chunks = zip(cut(keys), cut(values), cut(queries), _cut_gates(joined, config.main_chunk), strict=True)
        for k, v, q, used in main_chunks:
            before = main
            main, reads = banks[1].write(before, k, v, used)
            features.append(self._read_main(banks[1], before, reads, q))
        return torch.cat(features, 2), (projections, main), joined

    def _read_main(self, bank: Bank, before: State, reads: ChunkReads, queries: Tensor) -> Tensor:
        return reads.causal(queries) if self.memory_config.read == "causal" else bank.boundary(before, queries)

    def _project(
        self, bank: Bank, state: State, tensors: Sequence[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """k, v, q and the gates of one chunk, all read at the chunk's start state."""
        config, scale = self.memory_config, self.memory_config.contribution
        x, q, static_k, static_v, static_eta, static_alpha = tensors
        reads = bank.read(state, x)
        read_k, read_v, read_eta, read_alpha, *read_q = reads.unbind(2)
        k = unit(torch.add(static_k, read_k, alpha=scale))
        v = torch.add(static_v, read_v, alpha=scale)
        v = unit(v) if config.normalise_values else v
        if config.adaptive_query:
            q = unit(torch.add(q, read_q[0], alpha=scale))
        eta = config.eta_bound * torch.sigmoid(self._gate(static_eta, read_eta, self.eta_weight))
        log_alpha = F.logsigmoid(self._gate(static_alpha, read_alpha, self.alpha_weight))
        if mask is None:
            return k, v, q, Gates(eta, log_alpha)
        mask = mask.squeeze(-1)
        return k, v, q, Gates(eta * mask, log_alpha * mask, mask)

    def _gate(self, static: Tensor, read: Tensor, weight: Tensor) -> Tensor:
        """Logit [B, H, C]: the static part plus 8 c w . M(x)."""
        column = (GATE_SCALE * self.memory_config.contribution * weight.to(read.dtype)).unsqueeze(-1)
        return (static + read @ column).squeeze(-1)

    def _static_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """8 w . x + b of both gates for the whole sequence, [B, H, L, 1] each."""
        logit = lambda w, b: GATE_SCALE * (x @ w.to(x.dtype).unsqueeze(-1)) + b.to(x.dtype)[:, None, None]
        return logit(self.eta_weight, self.eta_bias), logit(self.alpha_weight, self.alpha_bias)

    @torch.no_grad()
    def _summarise(self, bank: Bank, main: State, gates: list[Gates]) -> GateStatistics:
        joined = _join_gates(gates)
        norm = torch.stack([s.weight.float().square().flatten(2).sum(-1) for s in main]).sum(0).sqrt()
        return GateStatistics(joined.eta.detach(), joined.log_alpha.detach().exp(), norm)

    def flops(self, length: int) -> Flops:
        """Per token, forward. Projections and convolutions, memory reads as dense; memory writes apart."""
        dense = self.input.flops() + self.query.flops() + self.gate.flops() + self.output.flops()
        width, heads, head_dim = self.config.width, self.config.heads, self.config.head_dim
        conv = 2 * 2.0 * width * self.memory_config.conv_width
        static = 4.0 * width * head_dim if self.memory_config.static == "learned" else 0.0
        reads, writes = self.memories.flops(len(self.boxes), self.memory_config.projection_chunk, head_dim)
        return dense + Flops(conv + static + heads * reads, heads * writes)


def _cut(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """[B, H, L, ...] -> L / size tensors [B, H, size, ...]."""
    return x.unflatten(2, (-1, size)).unbind(2)


def _join_gates(gates: list[Gates]) -> Gates:
    valid = None if gates[0].valid is None else torch.cat([g.valid for g in gates if g.valid is not None], -1)
    return Gates(torch.cat([g.eta for g in gates], -1), torch.cat([g.log_alpha for g in gates], -1), valid)


def _cut_gates(gates: Gates, size: int) -> list[Gates]:
    cut = lambda t: (t,) if t is None else t.unflatten(2, (-1, size)).unbind(2)
    valid = cut(gates.valid) if gates.valid is not None else [None] * len(cut(gates.eta))
    return [Gates(e, a, m) for e, a, m in zip(cut(gates.eta), cut(gates.log_alpha), valid, strict=True)]
