"""A mixer of one's own in one file: Gated DeltaNet (Yang et al., 2025) on the chunk that the project has.

The tests register it as a user would, with `model.imports=[gated_delta]`, and touch nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents, layout_of
from hope.flops import Flops
from hope.layers import Linear, RMSNorm, unit
from hope.memory.delta import DeltaChunk, DeltaState, Gates
from hope.mixers import Mixer, Report, State, Trunk, mixer
from hope.parameters import constant, new_parameter, normal
from hope.sections import MixerSection, Problem


@dataclass
class GatedDeltaConfig(MixerSection):
    """The section `model.mixers.gated_delta_of_a_test`."""

    chunk: int = 16
    """Tokens of a chunk. The result does not depend on it: keys are known before the memory is read."""

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        if self.chunk < 1:
            yield Problem(f"{path}.chunk", f"{self.chunk} is less than 1", "16")


@dataclass(frozen=True)
class Memory(State):
    """weight: [B, H, K, K], fp32."""

    weight: Tensor

    def compared(self) -> dict[str, Tensor]:
        return {"memory": self.weight}


@mixer("gated_delta_of_a_test", section=GatedDeltaConfig)
class GatedDelta(Mixer):
    """W_t = W_{t-1} alpha_t (I - beta_t k k^T) + beta_t v k^T, y_t = W_t q_t."""

    def __init__(self, trunk: Trunk, config: GatedDeltaConfig) -> None:
        super().__init__()
        width, heads, self.head_dim = trunk.width, trunk.heads, trunk.head_dim
        self.chunk = config.chunk
        self.query, self.key, self.value, self.gate = (Linear(width, width, "column") for _ in range(4))
        self.output = Linear(width, width, "row")
        gate = lambda *shape, init: new_parameter(heads, *shape, init=init, cut=0, update="elementwise")
        self.beta_weight, self.alpha_weight = gate(width, init=normal(0.02)), gate(width, init=normal(0.02))
        self.alpha_bias = gate(init=constant(4.0))
        self.norm = RMSNorm(self.head_dim, used="heads")

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Memory]:
        x_TBD = self.enter(x_TBD)
        dtype = torch.promote_types(x_TBD.dtype, torch.float32)
        layout = layout_of(x_TBD, documents, self.chunk)
        heads = lambda z: layout.spread(z.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3).to(dtype))
        logit = lambda w: layout.spread((x_TBD.to(dtype) @ w.to(dtype).mT).permute(1, 2, 0).unsqueeze(-1)).squeeze(-1)
        q, k, v = unit(heads(self.query(x_TBD))), unit(heads(self.key(x_TBD))), heads(self.value(x_TBD))
        beta, log_alpha = (
            torch.sigmoid(logit(self.beta_weight)),
            F.logsigmoid(logit(self.alpha_weight) + self.alpha_bias.to(dtype)[:, None]),
        )
        if layout.valid is not None:  # padding neither writes nor forgets
            beta, log_alpha = beta * layout.valid.unsqueeze(1), log_alpha * layout.valid.unsqueeze(1)
        y, weight = self._scan(q, k, v, beta, log_alpha, layout.resets, state)
        if self.watched:
            norm = weight.detach().square().sum((-1, -2)).sqrt().mean()
            self.collected = Report({"memory_norm": norm}, {"beta": beta.detach()})
        y = F.rms_norm(layout.collect(y), (self.head_dim,), self.norm.weight.to(dtype), eps=1e-6).to(x_TBD.dtype)
        merged = y.permute(2, 0, 1, 3).flatten(-2)
        return self.leave(self.output(merged * F.silu(self.gate(x_TBD)))), Memory(weight)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor, resets: Tensor | None,
        state: State | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight = self.start(q.shape[0]).weight if state is None else state.weight
        weight, outputs = weight.to(q.dtype), []
        cut = lambda t: t.unflatten(2, (-1, self.chunk)).unbind(2)
        for i, (q_c, k_c, v_c, b_c, a_c) in enumerate(zip(*map(cut, (q, k, v, beta, log_alpha)), strict=True)):
            if resets is not None:
                weight = weight.masked_fill(resets[:, i].view(-1, 1, 1, 1), 0.0)
            gates = Gates(b_c, a_c, erase=a_c.exp() * b_c)
            written = DeltaChunk(k_c, gates).write(DeltaState(weight), k_c @ weight.mT, -v_c)
            outputs.append(written.read(q_c, q_c @ weight.mT))
            weight = written.state.weight
        return torch.cat(outputs, 2), weight

    def start(self, batch: int) -> Memory:
        heads = self.beta_weight.shape[0]
        return Memory(torch.zeros(batch, heads, self.head_dim, self.head_dim, device=self.beta_weight.device))

    def flops(self, length: int) -> Flops:
        linear = [self.query, self.key, self.value, self.gate, self.output]
        heads, width = self.beta_weight.shape
        memory = heads * (4 * self.head_dim**2 + 4 * self.chunk * self.head_dim)
        return Flops(
            sum(m.flops().dense for m in linear) + 4.0 * heads * width + memory, heads * 2.0 * self.head_dim**2
        )

    def report(self) -> Report:
        return self.collected
