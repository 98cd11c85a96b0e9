"""The sections of Titans and TTT: published layers as rows of one table, and every choice as a key of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hope.sections import MixerSection, Problem

MAX_DEPTH = 4
"""Of the deepest memory that Titans compares (Appendix G.3)."""


@dataclass(frozen=True)
class TitansRule:
    """One row of the table. The fields but the paper and the last are keys of `TitansConfig`, which documents them."""

    paper: str
    depth: int = 2
    expansion: int = 1
    activation: Literal["silu", "gelu"] = "silu"
    residual: bool = False
    inner_norm: bool = False
    momentum: bool = True
    decay: bool = True
    conv_width: int = 4
    unit_keys: bool = True
    gate: Literal["none", "silu", "sigmoid"] = "silu"
    chunk: int = 16
    theta: float | None = None
    """theta_max times the width of a head, if it is not given; None: theta_max is 4^-(depth + 1)."""


_TTT = TitansRule(
    "Sun et al., 2024, Learning to (Learn at Test Time), TTT-Linear",
    depth=1,
    residual=True,
    inner_norm=True,
    momentum=False,
    decay=False,
    unit_keys=False,
    theta=1.0,
)
TITANS_RULES: dict[str, TitansRule] = {
    "lmm": TitansRule(
        "Behrouz et al., 2024, Titans, the long-term memory module alone",
        expansion=4,
        activation="gelu",
        residual=True,
        inner_norm=True,
    ),
    "ttt_linear": _TTT,
    "ttt_mlp": dataclasses.replace(
        _TTT,
        paper="Sun et al., 2024, Learning to (Learn at Test Time), TTT-MLP",
        depth=2,
        expansion=4,
        activation="gelu",
        theta=0.1,
    ),
}


@dataclass
class TitansConfig(MixerSection):
    """Titans' long-term memory and TTT: a network per head, trained in the sequence on 1/2 |M(k) - v|^2."""

    rule: Literal["lmm", "ttt_linear", "ttt_mlp"] = "lmm"
    """The published layer, which sets every key below that is null (docs/family.md has the table)."""
    depth: int | None = None
    """Layers of the memory, 1 to 4. 1: a matrix."""
    expansion: int | None = None
    """Hidden width of the memory over the head width."""
    activation: Literal["silu", "gelu"] | None = None
    """Between the layers of the memory."""
    residual: bool | None = None
    """Whether the memory's input is added to its output."""
    inner_norm: bool | None = None
    """Layer norm of the memory's last product, with learned scale and shift per head."""
    momentum: bool | None = None
    """Whether past surprise goes on: S_t = eta_t S_{t-1} - theta_t G_t."""
    decay: bool | None = None
    """Whether the memory forgets a share alpha_t of its weights at each token."""
    theta_max: float | None = None
    """Bound of the inner rate theta; null: 1 (TTT-Linear) or 0.1 (TTT-MLP) over the head width, else 4^-(depth + 1).
    Four times that overflowed or came close, and without inner_norm the same did (docs/family.md)."""
    momentum_max: float = 0.9
    """Bound of eta."""
    decay_bias: float | None = None
    """Initial bias of alpha's sigmoid; null: -4 for a matrix (keeps 98 % per token), -8 for deeper memories, which
    cannot learn from weights of zero."""
    conv_width: int | None = None
    """Taps of causal depthwise convolutions with silu on q, k and v; 0: neither convolution nor silu."""
    unit_keys: bool | None = None
    """L2-normalise q and k."""
    gate: Literal["none", "silu", "sigmoid"] | None = None
    """Output gate: none, or this function of a projection."""
    chunk: int | None = None
    """Tokens whose inner gradients are taken at one state. Changes the result: 1 is the recurrence itself."""

    def resolved(self) -> TitansRule:
        """The row of the table with the keys that are given."""
        own = {field.name for field in dataclasses.fields(TitansConfig)}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(TitansRule) if f.name in own}
        return dataclasses.replace(TITANS_RULES[self.rule], **{k: v for k, v in given.items() if v is not None})

    def theta_bound(self, head_dim: int) -> float:
        """The largest theta."""
        if self.theta_max is not None:
            return self.theta_max
        rule = self.resolved()
        return 4.0 ** -(rule.depth + 1) if rule.theta is None else rule.theta / head_dim

    @property
    def decay_start(self) -> float:
        """The initial bias of alpha."""
        if self.decay_bias is not None:
            return self.decay_bias
        return -4.0 if self.resolved().depth == 1 else -8.0

    def kinds(self) -> dict[str, TitansConfig]:
        """Every rule."""
        return {name: TitansConfig(rule=name) for name in TITANS_RULES}  # type: ignore[arg-type]

    def paper(self) -> str:
        """Of the rule."""
        return TITANS_RULES[self.rule].paper

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        rule = self.resolved()
        told = f"of rule {self.rule}"
        if not 1 <= rule.depth <= MAX_DEPTH:
            yield Problem(f"{path}.depth", f"{rule.depth} is not in 1 to {MAX_DEPTH}", "1 or 2")
        if rule.expansion < 1:
            yield Problem(f"{path}.expansion", f"{rule.expansion} is less than 1", "1 or 4")
        for key in ("expansion", "activation"):
            if getattr(self, key) is not None and rule.depth == 1:
                yield Problem(f"{path}.{key}", f"is not used: depth is 1 {told}", "leave it out, or depth 2")
        if rule.chunk < 1:
            yield Problem(f"{path}.chunk", f"{rule.chunk} is less than 1", "16")
        if rule.conv_width < 0:
            yield Problem(f"{path}.conv_width", f"{rule.conv_width} is negative", "4, or 0 for none")
        if self.theta_max is not None and not self.theta_max > 0:
            yield Problem(f"{path}.theta_max", f"{self.theta_max} is not positive", f"{self._theta(head_dim):g}")
        if not 0 < self.momentum_max < 1:
            yield Problem(f"{path}.momentum_max", f"{self.momentum_max} is not in (0, 1)", "0.9, or momentum false")
        elif self.momentum_max != 0.9 and not rule.momentum:
            yield Problem(f"{path}.momentum_max", f"is not used: no momentum {told}", "leave it out, or momentum true")
        if self.decay_bias is not None and not rule.decay:
            yield Problem(f"{path}.decay_bias", f"is not used: no decay {told}", "leave it out, or decay true")

    def _theta(self, head_dim: int) -> float:
        return dataclasses.replace(self, theta_max=None).theta_bound(head_dim)


@dataclass
class WithAttentionConfig(TitansConfig):
    """Titans' long-term memory and attention, which sees learned keys and values too."""

    persistent: int = 128
    """Learned keys and values per head that every token's attention sees."""
    rope_base: float = 10000.0
    """Base of the attention's rotary positions."""

    def kinds(self) -> dict[str, TitansConfig]:
        """One."""
        return {}

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        yield from super().problems(path, head_dim)
        if head_dim % 2:
            yield Problem("model.heads", f"head width {head_dim} is odd; rotary embedding needs pairs", "an even width")
        if self.persistent < 0:
            yield Problem(f"{path}.persistent", f"{self.persistent} is negative", "128, or 0 for none")
        if not self.rope_base > 0:
            yield Problem(f"{path}.rope_base", f"{self.rope_base} is not positive", "10000.0")
