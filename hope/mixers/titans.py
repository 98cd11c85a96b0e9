"""Titans' long-term memory as a layer of its own (LMM; Behrouz et al., 2024), and TTT-Linear and TTT-MLP (Sun et al.,
2024): rows of the table in `hope.memory.titans_config`. Per head, M being a network that is trained in the sequence,

    o = W_o (norm(M_t(q_t)) * [silu or sigmoid of W_g z])
"""

from __future__ import annotations

from torch import Tensor

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import Linear, RMSNorm, gated
from hope.memory.titans_config import TitansConfig
from hope.mixers.base import Mixer, Report, State, Trunk, mixer
from hope.mixers.long_term import LongTermMemory, MemoryState, summary
from hope.mixers.vectors import normed_and_joined


@mixer("titans", section=TitansConfig)
class Titans(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], state). Parameters of a head touch only that head's memory."""

    def __init__(self, trunk: Trunk, config: TitansConfig) -> None:
        super().__init__()
        self.memory = LongTermMemory(trunk, config)
        self.rule, self.chunk = self.memory.rule, self.memory.chunk
        self.norm = RMSNorm(trunk.head_dim, used="heads")
        if self.rule.gate != "none":
            self.gate = Linear(trunk.width, trunk.width, "column")
        self.output = Linear(trunk.width, trunk.width, "row")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState]:
        assert state is None or isinstance(state, MemoryState)
        x_TBD = self.enter(x_TBD)
        y, after, writes = self.memory(x_TBD, state, documents)
        if self.watched:
            self.collected = summary(after.weights, writes)
        y_TBD = self.form(normed_and_joined)(y, self.norm.weight, x_TBD.dtype)
        if self.rule.gate != "none":
            y_TBD = self.form(gated)(self.gate(x_TBD), y_TBD, self.rule.gate)
        return self.leave(self.output(y_TBD)), after

    def start(self, batch: int) -> MemoryState:
        """The meta-learned initial weights, and nothing pending."""
        return self.memory.start(batch)

    def flops(self, length: int) -> Flops:
        """Per token, forward."""
        maps = [self.output] + ([self.gate] if self.rule.gate != "none" else [])
        return sum((m.flops() for m in maps), self.memory.flops())

    def report(self) -> Report:
        """See `hope.mixers.long_term.summary`."""
        return self.collected
