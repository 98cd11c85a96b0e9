"""The section of the mixer `linear`: published layers as rows of one table, and every choice as a key of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hope.sections import MixerSection, Problem

Decay = Literal["none", "constant", "head", "channel"]
Write = Literal["one", "beta", "step"]
Features = Literal["identity", "elu1"]
Gate = Literal["none", "silu", "sigmoid"]


@dataclass(frozen=True)
class Rule:
    """One row of the table. The fields but the paper are keys of `LinearConfig`, which documents them."""

    paper: str = ""
    decay: Decay = "none"
    write: Write = "one"
    erase: bool = False
    feature_map: Features = "identity"
    normaliser: bool = False
    rope_base: float = 0.0
    conv_width: int = 0
    unit_keys: bool = False
    head_norm: bool = True
    gate: Gate = "none"
    skip: bool = False


_DELTA = Rule(
    "Schlag et al., 2021; Yang et al., 2024, the delta rule in parallel",
    write="beta",
    erase=True,
    conv_width=4,
    unit_keys=True,
)
RULES: dict[str, Rule] = {
    "linear_attention": Rule(
        "Katharopoulos et al., 2020, Transformers are RNNs", feature_map="elu1", normaliser=True, head_norm=False
    ),
    "retnet": Rule("Sun et al., 2023, Retentive Network", decay="constant", rope_base=10000.0, gate="silu"),
    "ssd": Rule(
        "Dao and Gu, 2024, Transformers are SSMs, B and C per head",
        decay="head",
        write="step",
        conv_width=4,
        gate="silu",
        skip=True,
    ),
    "deltanet": _DELTA,
    "gated_deltanet": dataclasses.replace(
        _DELTA, paper="Yang et al., 2025, Gated Delta Networks", decay="head", gate="silu"
    ),
    "kda": dataclasses.replace(_DELTA, paper="Kimi Team, 2025, Kimi Linear", decay="channel", gate="sigmoid"),
}


@dataclass
class LinearConfig(MixerSection):
    """Linear attention, RetNet, SSD, DeltaNet, Gated DeltaNet and KDA: W <- W Diag(a) + b (v - [erased]) k^T."""

    rule: Literal["linear_attention", "retnet", "ssd", "deltanet", "gated_deltanet", "kda"] = "gated_deltanet"
    """The published layer, which sets every key below that is null (docs/family.md has the table)."""
    decay: Literal["none", "constant", "head", "channel"] | None = None
    """What is forgotten at each token: nothing, a fixed share per head (1 - 2^(-5-h) stays), or a share that depends on
    the token, per head or per key channel."""
    write: Literal["one", "beta", "step"] | None = None
    """Rate of a write: 1, a sigmoid gate per head, or the step of the decay's gate (Mamba-2's dt)."""
    erase: bool | None = None
    """Whether what the memory holds under a key is taken out before the write, at the same rate: the delta rule."""
    feature_map: Literal["identity", "elu1"] | None = None
    """Of q and k: as they are, or elu(x) + 1."""
    normaliser: bool | None = None
    """Whether a read is divided by the sum of its weights. Needs elu1, which keeps them positive, and no erasing."""
    rope_base: float | None = None
    """Base of rotary positions of q and k; 0: none."""
    conv_width: int | None = None
    """Taps of causal depthwise convolutions with silu on q, k and v; 0: neither convolution nor silu."""
    unit_keys: bool | None = None
    """L2-normalise q and k."""
    head_norm: bool | None = None
    """RMS norm of every head's output."""
    gate: Literal["none", "silu", "sigmoid"] | None = None
    """Output gate: none, or this function of a projection."""
    skip: bool | None = None
    """Add each value to its own read, times a learned number per head (Mamba-2's D)."""
    write_max: float = 1.0
    """Bound of the beta gate. 2 allows negative eigenvalues with erasing (Grazzi et al., 2025)."""
    decay_rank: int | None = None
    """Inner width of the decay gate per channel; null: the width of a head."""
    chunk: int = 64
    """Tokens that are computed together. Changes speed and rounding, not the result."""
    kernel: Literal["auto", "plain"] = "auto"
    """Form of the loop over chunks. auto: Triton kernels on a GPU, in bf16 for heads of 64 and 128, in fp32 with TF32
    for heads of 64, with chunk 64 and rows of one document, but for decays per channel and a normaliser; plain: PyTorch
    everywhere."""

    def resolved(self) -> Rule:
        """The row of the table with the keys that are given."""
        keys = [field.name for field in dataclasses.fields(Rule) if field.name != "paper"]
        given = {key: getattr(self, key) for key in keys}
        return dataclasses.replace(RULES[self.rule], **{k: v for k, v in given.items() if v is not None})

    def kinds(self) -> dict[str, LinearConfig]:
        """Every rule."""
        return {name: LinearConfig(rule=name) for name in RULES}  # type: ignore[arg-type]

    def paper(self) -> str:
        """Of the rule."""
        return RULES[self.rule].paper

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        rule = self.resolved()
        told = f"of rule {self.rule}"
        if rule.write == "step" and rule.decay != "head":
            what = f"a write by the step needs a decay with one step per head, not decay {rule.decay} {told}"
            yield Problem(f"{path}.write", what, "write beta, or decay head")
        elif rule.write == "step" and rule.erase:
            what = f"erasing at the rate of a step, which has no bound, diverges (erase true, write step {told})"
            yield Problem(f"{path}.write", what, "write beta, or erase false")
        if rule.normaliser and (rule.feature_map != "elu1" or rule.erase or rule.unit_keys or rule.rope_base):
            state = f"feature_map {rule.feature_map}, erase {rule.erase}, unit_keys {rule.unit_keys}"
            what = f"a sum of weights that may be 0 cannot divide: {state}, rope_base {rule.rope_base:g} {told}"
            fix = "normaliser false, or feature_map elu1, erase false, unit_keys false and rope_base 0"
            yield Problem(f"{path}.normaliser", what.lower(), fix)
        yield from self._numbers(path, head_dim, rule)

    def _numbers(self, path: str, head_dim: int, rule: Rule) -> Iterator[Problem]:
        if rule.rope_base < 0:
            yield Problem(f"{path}.rope_base", f"{rule.rope_base} is negative", "10000.0, or 0 for none")
        elif rule.rope_base and head_dim % 2:
            yield Problem("model.heads", f"head width {head_dim} is odd; rotary embedding needs pairs", "an even width")
        if rule.conv_width < 0:
            yield Problem(f"{path}.conv_width", f"{rule.conv_width} is negative", "4, or 0 for none")
        if not 0 < self.write_max <= 2:
            yield Problem(f"{path}.write_max", f"{self.write_max} is not in (0, 2]", "1.0 or 2.0")
        elif self.write_max != 1 and rule.write != "beta":
            yield Problem(f"{path}.write_max", f"is not used: write is {rule.write}", "leave it out, or write beta")
        if self.decay_rank is not None and rule.decay != "channel":
            yield Problem(f"{path}.decay_rank", f"is not used: decay is {rule.decay}", "leave it out, or decay channel")
        elif self.decay_rank is not None and self.decay_rank < 1:
            yield Problem(f"{path}.decay_rank", f"{self.decay_rank} is less than 1", f"{head_dim}")
        if self.chunk < 1:
            yield Problem(f"{path}.chunk", f"{self.chunk} is less than 1", "64")
