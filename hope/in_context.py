"""A CMS level whose MLP every sequence rewrites as it goes (Eq. 71, in the sequence instead of by the optimizer):

    u = sqrt(K) unit(W_in z) per head            y = W_out M_t(u)

M is one MLP K -> F -> K per head that starts from meta-learned weights (`hope.memory.in_context`). All writes are part
of the forward pass, so the outer gradient goes through them. The state, fp32 whatever the model's dtype, is what a
sequence has written: 2 H K F numbers, where an MLP of full width would have 2 D times its hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hope.documents import NO_PENDING, Documents, layout_of
from hope.flops import Flops
from hope.layers import Linear, RMSNorm
from hope.memory import in_context
from hope.memory.deep import DeepMemory
from hope.memory.in_context import RewrittenMlp, Tokens
from hope.memory.in_context_config import InContextConfig, Sizes
from hope.memory.titans_config import TitansConfig
from hope.mixers import Mixer, Report, State
from hope.mixers.long_term import MemoryState, Rates
from hope.mixers.vectors import joined, keys_of
from hope.parameters import new_parameter, normal


class InContextMlp(Mixer):
    """forward: x [T, B, D] -> (y [T, B, D], `MemoryState`: weights, D of the slowest level; history, the last input of
    the heads; waiting, the tokens since that level's last border).

    Args:
        levels: one, or nested ones, fastest first, that are alike but for clocks and rates.
    """

    compiles_whole = False  # a loop over chunks, which would make one graph per length

    def __init__(self, width: int, levels: Sequence[InContextConfig], sizes: Sizes, name: str) -> None:
        super().__init__()
        self.levels, self.sizes, self.name = tuple(levels), sizes, name
        self.section, self.chunk = levels[0], levels[-1].chunk
        heads, inner = sizes.heads, sizes.heads * sizes.head_dim
        self.input = Linear(width, inner, "column", sizes.head_dim)
        self.writes = any(level.rate_bound() > 0 for level in levels)
        if self.section.objective == "target" and self.writes:
            self.target = Linear(width, inner, "column", sizes.head_dim)
        self.output = Linear(inner, width, "row")
        new = lambda *shape: new_parameter(
            heads, *shape, init=normal(shape[-1] ** -0.5), cut=0, update="matrix_per_head"
        )
        self.first, self.second = new(sizes.hidden, sizes.head_dim), new(sizes.head_dim, sizes.hidden)
        rates = lambda level: Rates(heads, width, _rates(level, sizes), sizes.head_dim)
        self.rates = nn.ModuleList(rates(level) for level in levels if self.writes)

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, MemoryState)
        if not self.writes:
            return self.ordinary(x_TBD), None
        x_TBD = self.enter(x_TBD)
        before = self._start(x_TBD.shape[1]) if state is None else state
        wide, history = self._tokens(x_TBD, before, documents)
        if before.pending.slots:
            wide = torch.cat([before.waiting, wide], 2)
        layout = layout_of(x_TBD, documents, self.chunk, before.pending)
        tokens = self._apart(layout.spread(wide))
        y, weights = self._mlp(wide.dtype)(tokens, layout, None if state is None else before.weights)
        after = MemoryState(weights, history, layout.remaining(wide), layout.left)
        if self.watched:
            self.collected = self._summary(after, tokens)
        return self.leave(self.output(self.form(joined)(layout.collect(y), x_TBD.dtype))), after

    def ordinary(self, x_TBD: Tensor) -> Tensor:
        """The MLP with its first weights, which it keeps if all rates are 0: [T, B, D] -> [T, B, D]."""
        x_TBD = self.enter(x_TBD)
        u = self._normed(self.input(x_TBD))
        y: Tensor = self.leave(self.output(self.form(joined)(self._mlp(u.dtype).unwritten(u), x_TBD.dtype)))
        return y

    def _normed(self, x_TBD: Tensor) -> Tensor:
        """[T, B, H K] -> [B, H, T, K], every head's input of root mean square 1."""
        wide = torch.promote_types(x_TBD.dtype, torch.float32)
        root: float = self.sizes.head_dim**0.5
        return self.form(keys_of)(x_TBD, self.sizes.head_dim, wide, False, True) * root

    def _tokens(self, x_TBD: Tensor, before: MemoryState, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """All that the MLP is brought, [B, H, T, 2 K + R], and the history after this call."""
        inputs = self.input(x_TBD)
        u, history = self._normed(inputs), before.history
        if self.section.objective == "target":
            other = self._normed(self.target(x_TBD))
        else:  # a token's pair is (the input before it, its own), which is known when it comes
            earlier = torch.cat([history.transpose(0, 1).to(inputs.dtype), inputs[:-1]])
            if documents is not None:
                earlier = earlier * documents.same(2)[0].unsqueeze(-1)
            other = self._normed(earlier)
            history = inputs[-1:].to(history.dtype).transpose(0, 1)  # always of the document that is open
        return torch.cat([u, other, *(rates(x_TBD, u.dtype) for rates in self._clocks())], -1), history

    def _apart(self, wide: Tensor) -> Tokens:
        """Queries, keys, values and rates. A key of zero, before a document's first token, writes nothing."""
        u, other, *rates = wide.split([*[self.sizes.head_dim] * 2, *(r.count for r in self._clocks())], -1)
        named = [r.named(values) for r, values in zip(self._clocks(), rates, strict=True)]
        theta = tuple(t for t, _, _ in named)
        log_keep = tuple(torch.zeros_like(t) if k is None else k for t, k, _ in named)
        keys, values = (u, other) if self.section.objective == "target" else (other, u)
        return Tokens(u, keys, values, theta, log_keep)

    def _clocks(self) -> list[Rates]:
        """`rates`, typed."""
        return list(self.rates)  # type: ignore[arg-type]

    def _mlp(self, dtype: torch.dtype) -> RewrittenMlp:
        """Bound to the initial weights, in the precision of the state."""
        memory = DeepMemory((self.first.to(dtype), self.second.to(dtype)), "silu", False, None, False)
        chunks = tuple(level.chunk for level in self.levels)
        return RewrittenMlp(memory, chunks, self.section.read == "causal", self.section.objective == "target")

    def start(self, batch: int) -> MemoryState | None:
        """Nothing written, nothing pending; None if nothing ever is."""
        return self._start(batch) if self.writes else None

    def _start(self, batch: int) -> MemoryState:
        like = self.input.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        past = 0 if self.section.objective == "target" else 1
        history = like.new_zeros(batch, past, like.shape[0], dtype=dtype)
        width = 2 * self.sizes.head_dim + sum(rates.count for rates in self._clocks())
        waiting = like.new_zeros(batch, self.first.shape[0], 0, width, dtype=dtype)
        return MemoryState(self._mlp(dtype).start(batch), history, waiting, NO_PENDING)

    def flops(self, length: int) -> Flops:
        """Per token, forward."""
        if not self.writes:
            return (
                self.input.flops() + self.output.flops() + Flops(2.0 * self.first.numel() + 2.0 * self.second.numel())
            )
        maps = [self.input, self.output] + ([self.target] if self.section.objective == "target" else [])
        heads, width, count = self.first.shape[0], self.input.weight.shape[1], len(self.levels)
        rates = 2.0 * width * heads * sum(r.count for r in self._clocks())
        reads, writes = in_context.flops(
            count, self.sizes.head_dim, self.sizes.hidden, self.levels[0].chunk,
            self.section.read == "causal", self.section.objective == "target",
        )  # fmt: skip
        return sum((m.flops() for m in maps), Flops(rates + heads * reads, heads * writes))

    @torch.no_grad()
    def _summary(self, after: MemoryState, tokens: Tokens) -> Report:
        """NAME_written: mean over sequences and heads of the norm of what is written, of the slowest level; and the
        rates of each level, alpha of those that forget."""
        squares = [layer.weight.float().square().sum((-1, -2)) for layer in after.weights]
        names = [f"{self.name}.{number}" if len(self.levels) > 1 else self.name for number in range(len(self.levels))]
        histograms = {f"{n}_theta": t.detach() for n, t in zip(names, tokens.theta, strict=True)}
        kept = zip(names, tokens.log_keep, self._clocks(), strict=True)
        histograms |= {f"{n}_alpha": -torch.expm1(k.detach()) for n, k, rates in kept if rates.decays}
        return Report({f"{self.name}_written": torch.stack(squares).sum(0).sqrt().mean()}, histograms)

    def report(self) -> Report:
        """See `_summary`."""
        return self.collected


def _rates(level: InContextConfig, sizes: Sizes) -> TitansConfig:
    """The rates of a level in the words of Titans. Inputs have the norm sqrt(K)."""
    bias = 0.0 if level.forget_bias is None else level.forget_bias
    bound = level.rate_bound() / sizes.head_dim
    return TitansConfig(momentum=False, decay=level.forget_bias is not None, decay_bias=bias, theta_max=bound)


class InContextLevel(nn.Module):
    """norm, then the MLP that is rewritten, to be added to x."""

    def __init__(self, width: int, levels: Sequence[InContextConfig], sizes: Sizes, eps: float, name: str) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(width, eps=eps), InContextMlp(width, levels, sizes, name)
