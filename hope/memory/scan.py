"""The loop over chunks of self-modifying Titans (Eq. 83-90) as a function of tensors.

This is the plain form, the reference of any kernel. `hope.memory.kernels` chooses between them. Whatever does not
depend on the state (static paths, static parts of the gates) is given for the whole sequence at once.

Shapes: B sequences, H heads, L tokens (a multiple of the window, see `hope.documents`), K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import ChunkLayout
from hope.layers import unit
from hope.memory.bank import Bank, ChunkReads, State, keep_rows, reset_rows
from hope.memory.config import MemoryConfig
from hope.memory.delta import Gates
from hope.memory.shapes import shapes_only

# read-outs start near 0 with unit-norm inputs; 8 lets a gate travel its range with weights of ordinary size
GATE_SCALE = 8.0


class Given(NamedTuple):
    """What a mixer brings: x, q [B, H, L, K]; the learned static paths S_k, S_v [H, K, K], if the configuration has
    them; the gates' biases [H]; if it has those, the projected static paths s_k, s_v [B, H, L, K], and read-out [H, K]
    and bias [H] of an erase rate of its own."""

    x: Tensor
    q: Tensor
    static_k: Tensor | None
    static_v: Tensor | None
    eta_bias: Tensor
    alpha_bias: Tensor
    projected_k: Tensor | None = None
    projected_v: Tensor | None = None
    erase_weight: Tensor | None = None
    erase_bias: Tensor | None = None


class Sequences(NamedTuple):
    """What a sequence brings to the loop: x, q, static k and v [B, H, L, K], static logits [B, H, L, 1]; the erase rate
    over alpha [B, H, L, 1], if it is not the write rate."""

    x: Tensor
    q: Tensor
    static_k: Tensor
    static_v: Tensor
    static_eta: Tensor
    static_alpha: Tensor
    erase: Tensor | None = None


class Memories(NamedTuple):
    """The meta-learned side: two banks bound to their initial states (the same bank when chunk sizes are equal and
    writes are shared), and the gates' read-outs [H, K]."""

    projections: Bank
    main: Bank
    eta_weight: Tensor
    alpha_weight: Tensor

    @property
    def shared(self) -> bool:
        return self.projections is self.main


class States(NamedTuple):
    """Fast weights of the two banks (the same tuple when they are shared)."""

    projections: State
    main: State


class Scanned(NamedTuple):
    """y [B, H, L, K], the states at every row's last chunk boundary, and the gates of all windows."""

    y: Tensor
    states: States
    gates: list[Gates]


def scan(config: MemoryConfig, memories: Memories, given: Given, layout: ChunkLayout, state: States | None) -> Scanned:
    """Run all chunks. `state`: at the first token of the layout; None: the initial states."""
    sequences = _sequences(config, memories, given)
    batch, dtype = sequences.x.shape[0], sequences.x.dtype
    initial = States(memories.projections.start(batch), memories.main.start(batch))
    now = initial if state is None else state
    loop = _Loop(config, memories)
    if shapes_only(sequences.x):
        first = [t[:, :, : config.window] for t in sequences if t is not None]
        features, after, used = loop.window(now, first, None)
        features = features.new_empty(*features.shape[:2], layout.padded, features.shape[3])
        return Scanned(memories.main.output(features), after, [used])
    # cut into windows by unbind: slices inside the loop would make the backward quadratic in the number of chunks
    windows = zip(*(_cut(t, config.window) for t in sequences if t is not None), strict=True)
    valid: Sequence[Tensor | None] = [None] * (layout.padded // config.window)
    if layout.valid is not None:
        valid = list(layout.valid.to(dtype).unsqueeze(1).unflatten(-1, (-1, config.window)).unbind(2))
    outputs, gates = [], []
    for index, (tensors, real) in enumerate(zip(windows, valid, strict=True)):
        if layout.resets is not None:
            now = _both(now, lambda a, b, rows=layout.resets[:, index]: reset_rows(a, b, rows), initial)
        features, after, used = loop.window(now, tensors, real)
        outputs.append(features)
        gates.append(used)
        unfinished = layout.partial[index]
        if unfinished is None:
            now = after
        elif unfinished is not True:
            now = _both(now, lambda a, b, rows=unfinished: keep_rows(a, b, rows), after)
    return Scanned(memories.main.output(torch.cat(outputs, 2)), now, gates)


def _sequences(config: MemoryConfig, memories: Memories, given: Given) -> Sequences:
    """What the loop needs of the whole sequence at once: static paths and static parts of the gates."""
    x = given.x
    static_k, static_v = (x, x) if config.static == "identity" else (torch.zeros_like(x), torch.zeros_like(x))
    if given.static_k is not None and given.static_v is not None:
        static_k, static_v = x @ given.static_k.to(x.dtype).mT, x @ given.static_v.to(x.dtype).mT
    elif given.projected_k is not None and given.projected_v is not None:
        static_k, static_v = given.projected_k.to(x.dtype), given.projected_v.to(x.dtype)
    logit = lambda w, b: GATE_SCALE * (x @ w.to(x.dtype).unsqueeze(-1)) + b.to(x.dtype)[:, None, None]
    eta, alpha = logit(memories.eta_weight, given.eta_bias), logit(memories.alpha_weight, given.alpha_bias)
    erase = None
    if given.erase_weight is not None and given.erase_bias is not None and config.erase_max is not None:
        erase = config.erase_max * torch.sigmoid(logit(given.erase_weight, given.erase_bias))
    return Sequences(x, given.q, static_k, static_v, eta, alpha, erase)


def _both(states: States, change, others: States) -> States:  # type: ignore[no-untyped-def]
    """change(state, other) on both banks; once where they are the same."""
    main = change(states.main, others.main)
    return States(main if states.projections is states.main else change(states.projections, others.projections), main)


@dataclass(frozen=True)
class _Loop:
    config: MemoryConfig
    memories: Memories

    def window(self, now: States, tensors: Sequence[Tensor], valid: Tensor | None) -> tuple[Tensor, States, Gates]:
        """One window: all projection chunks in it, then all main chunks in it. Returns features, states, gates."""
        chunks, after = self._projection_chunks(now, tensors, valid)
        gates = join_gates([chunk.gates for chunk in chunks])
        if self.memories.shared:
            return torch.cat([chunk.features for chunk in chunks if chunk.features is not None], 2), after, gates
        features, main = self._main_chunks(now.main, chunks, gates)
        return features, States(after.projections, main), gates

    def _projection_chunks(
        self, now: States, tensors: Sequence[Tensor], valid: Tensor | None
    ) -> tuple[list[_Chunk], States]:
        size, bank, state = self.config.projection_chunk, self.memories.projections, now.projections
        parts = [_cut(t, size) for t in tensors]
        masks = [None] * len(parts[0]) if valid is None else _cut(valid.unsqueeze(-1), size)
        chunks = []
        for *chunk, mask in zip(*parts, masks, strict=True):
            k, v, q, gates = self._project(state, Sequences(*chunk), mask)
            before = state
            state, reads = bank.write(before, k, v, gates)
            features = self._read_main(bank, before, reads, q) if self.memories.shared else None
            chunks.append(_Chunk(k, v, q, gates, features))
        return chunks, States(state, state)

    def _main_chunks(self, state: State, chunks: list[_Chunk], gates: Gates) -> tuple[Tensor, State]:
        size, features = self.config.main_chunk, []
        keys, values, queries = (
            _cut(torch.cat([getattr(c, name) for c in chunks], 2), size) for name in ("keys", "values", "queries")
        )
        for k, v, q, used in zip(keys, values, queries, _cut_gates(gates, size), strict=True):
            before = state
            state, reads = self.memories.main.write(before, k, v, used)
            features.append(self._read_main(self.memories.main, before, reads, q))
        return torch.cat(features, 2), state

    def _read_main(self, bank: Bank, before: State, reads: ChunkReads, queries: Tensor) -> Tensor:
        return reads.causal(queries) if self.config.read == "causal" else bank.boundary(before, queries)

    def _project(self, state: State, given: Sequences, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """k, v, q and the gates of one chunk, all read at the chunk's start state."""
        config, scale, q = self.config, self.config.contribution, given.q
        reads = dict(zip(config.boxes, self.memories.projections.read(state, given.x).unbind(2), strict=True))
        made = lambda box, static: torch.add(static, reads[box], alpha=scale) if box in reads else static
        k, v = unit(made("k", given.static_k)), made("v", given.static_v)
        v = unit(v) if config.normalise_values else v
        if config.adaptive_query:
            q = unit(made("q", q))
        eta = config.eta_bound * torch.sigmoid(self._gate(given.static_eta, reads["eta"], self.memories.eta_weight))
        log_alpha = F.logsigmoid(self._gate(given.static_alpha, reads["alpha"], self.memories.alpha_weight))
        # times alpha: (alpha I - erase k k^T) is alpha times what has eigenvalues in (-1, 1], whatever alpha is
        erase = None if given.erase is None else given.erase.squeeze(-1) * log_alpha.exp()
        if mask is None:
            return k, v, q, Gates(eta, log_alpha, erase=erase)
        mask = mask.squeeze(-1)
        return k, v, q, Gates(eta * mask, log_alpha * mask, mask, None if erase is None else erase * mask)

    def _gate(self, static: Tensor, read: Tensor, weight: Tensor) -> Tensor:
        """Logit [B, H, C]: the static part plus 8 c w . M(x)."""
        column = (GATE_SCALE * self.config.contribution * weight.to(read.dtype)).unsqueeze(-1)
        return (static + read @ column).squeeze(-1)


class _Chunk(NamedTuple):
    """What one projection chunk produced: k, v, q [B, H, C, K], gates, and the main memory's features if it is in the
    same bank."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    gates: Gates
    features: Tensor | None


def _cut(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """[B, H, L, ...] -> L / size tensors [B, H, size, ...]."""
    parts: tuple[Tensor, ...] = x.unflatten(2, (-1, size)).unbind(2)
    return parts


def join_gates(gates: list[Gates]) -> Gates:
    """The gates of consecutive chunks as those of one stretch of tokens."""
    valid = None if gates[0].valid is None else torch.cat([g.valid for g in gates if g.valid is not None], -1)
    erase = None if gates[0].erase is None else torch.cat([g.erase for g in gates if g.erase is not None], -1)
    return Gates(torch.cat([g.eta for g in gates], -1), torch.cat([g.log_alpha for g in gates], -1), valid, erase)


def _cut_gates(gates: Gates, size: int) -> list[Gates]:
    cut = lambda t: t.unflatten(2, (-1, size)).unbind(2)
    optional = lambda t: [None] * (gates.eta.shape[2] // size) if t is None else cut(t)
    parts = cut(gates.eta), cut(gates.log_alpha), optional(gates.valid), optional(gates.erase)
    return [Gates(*chunk) for chunk in zip(*parts, strict=True)]
