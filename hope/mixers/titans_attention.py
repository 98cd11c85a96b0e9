"""Titans with attention (Behrouz et al., 2024, Section 4): the long-term memory beside it or before it.

MAG, memory as a gate (Eq. 26-28), per head:      o = W_o (norm(SWA(z)) * sigmoid(norm(M_t(q_t))))
MAL, memory as a layer (Eq. 29-31):               m = LMM(z),   o = m + SWA(norm(z + m))

SWA is sliding-window attention to the last tokens and to persistent keys and values, which are learned and the same for
every input. They are what attention makes of persistent tokens at the front (Section 3.3). The equations leave out the
residual connections, and so MAL's printed form is SWA(M(z)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import RMSNorm, gated
from hope.memory.titans_config import WithAttentionConfig
from hope.mixers.attention import Attention, AttentionConfig, KeysAndValues
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.mixers.long_term import LongTermMemory, MemoryState, summary
from hope.mixers.titans import Titans
from hope.mixers.vectors import normed_and_joined
from hope.sections import Problem


@dataclass
class WithWindowConfig(WithAttentionConfig):
    """Titans' long-term memory and sliding-window attention."""

    window: int = 2048
    """Tokens that a token's attention sees, itself and those before it."""

    def attention(self) -> AttentionConfig:
        """The section of the attention."""
        return AttentionConfig(window=self.window, rope_base=self.rope_base)

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        yield from super().problems(path, head_dim)
        if self.window < 1:
            yield Problem(f"{path}.window", f"{self.window} is less than 1", "2048")


@dataclass
class GateConfig(WithWindowConfig):
    """Titans' memory as a gate (MAG): sliding-window attention times a function of what the memory reads."""

    gate: Literal["silu", "sigmoid"] = "sigmoid"
    """What the memory's normed reads go through before they multiply the attention's."""

    def paper(self) -> str:
        """Of the architecture."""
        return "Behrouz et al., 2024, Titans, memory as a gate (MAG)"


@dataclass
class LayerConfig(WithWindowConfig):
    """Titans' memory as a layer (MAL): the long-term memory, then sliding-window attention."""

    def paper(self) -> str:
        """Of the architecture."""
        return "Behrouz et al., 2024, Titans, memory as a layer (MAL)"


@dataclass(frozen=True)
class BothStates(State):
    """Of the memory and of the attention."""

    memory: MemoryState
    attention: KeysAndValues

    def reset(self, rows: Tensor, initial: BothStates) -> BothStates:
        """Of both."""
        return BothStates(self.memory.reset(rows, initial.memory), self.attention.reset(rows, initial.attention))

    def compared(self) -> dict[str, Tensor]:
        """The memory's layers, keys and values."""
        return self.memory.compared() | self.attention.compared()


@mixer("titans_mag", section=GateConfig)
class MemoryAsGate(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). The attention's output map is that of the product."""

    def __init__(self, trunk: Trunk, config: GateConfig) -> None:
        super().__init__()
        self.memory = LongTermMemory(trunk, config)
        self.attention = Attention(trunk, config.attention(), config.persistent)
        self.kind, self.chunk = config.gate, math.lcm(self.memory.chunk, config.window)
        self.norm_memory, self.norm_attention = (RMSNorm(trunk.head_dim, used="heads") for _ in range(2))

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, BothStates]:
        assert state is None or isinstance(state, BothStates)
        x_TBD = self.enter(x_TBD)
        before = (None, None) if state is None else (state.memory, state.attention)
        read, memory, writes = self.memory(x_TBD, before[0], documents)
        seen, keys_and_values = self.attention.mix(x_TBD, before[1], documents)
        if self.watched:
            self.collected = summary(memory.weights, writes)
        gate = self.form(normed_and_joined)(read, self.norm_memory.weight, x_TBD.dtype)
        seen = self.norm_attention(seen.unflatten(-1, (-1, self.memory.head_dim))).flatten(-2)
        out = self.leave(self.attention.output(self.form(gated)(gate, seen, self.kind)))
        return out, BothStates(memory, keys_and_values)

    def start(self, batch: int) -> BothStates:
        """The meta-learned initial weights, and no keys yet."""
        return BothStates(self.memory.start(batch), self.attention.start(batch))

    def flops(self, length: int) -> Flops:
        """Per token, forward."""
        return self.memory.flops() + self.attention.flops(length)

    def report(self) -> Report:
        """Of the memory, see `hope.mixers.long_term.summary`."""
        return self.collected


@mixer("titans_mal", section=LayerConfig)
class MemoryAsLayer(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Both layers are whole mixers, with borders of their own."""

    def __init__(self, trunk: Trunk, config: LayerConfig) -> None:
        super().__init__()
        del self.enter, self.leave  # the two inside have them, and what is between them is the trunk's
        self.memory = Titans(trunk, config)
        self.norm = RMSNorm(trunk.width)
        self.attention = Attention(trunk, config.attention(), config.persistent)
        self.chunk = math.lcm(self.memory.chunk, config.window)

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, BothStates]:
        assert state is None or isinstance(state, BothStates)
        before = (None, None) if state is None else (state.memory, state.attention)
        self.memory.watched = self.watched
        remembered, memory = self.memory(x_TBD, before[0], documents)
        seen, keys_and_values = self.attention(self.norm(x_TBD + remembered), before[1], documents)
        return remembered + seen, BothStates(memory, keys_and_values)

    def start(self, batch: int) -> BothStates:
        """The meta-learned initial weights, and no keys yet."""
        return BothStates(self.memory.start(batch), self.attention.start(batch))

    def flops(self, length: int) -> Flops:
        """Per token, forward."""
        return self.memory.flops(length) + self.attention.flops(length)

    def report(self) -> Report:
        """Of the memory, see `hope.mixers.long_term.summary`."""
        return self.memory.report()
