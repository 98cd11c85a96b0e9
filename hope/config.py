"""Model section of the configuration: what is computed, nothing about where.

The open choices of the paper (Nested Learning, Section 8) are fields here; each comment gives the default's reason.
Measured figures are held-out losses after 240 steps at 17-19M parameters, see docs/results.md.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Problem = tuple[str, str, str]

# The largest eta_max that trained with the memory's contribution scaled to 0.3; above, gradients overflow.
STABLE_ETA_MAX = {"matrix": 0.25, "mlp": 0.25}
DEFAULT_ETA_MAX = {"matrix": 0.25, "mlp": 0.0625}
DEFAULT_ALPHA_BIAS = {"matrix": 4.0, "mlp": 8.0}


@dataclass
class MemoryConfig:
    """Self-modifying Titans (Eq. 83-91): memories k, v, eta, alpha and main of every head."""

    kind: Literal["matrix", "mlp"] = "matrix"
    """matrix: M(z) = z + M z, all memories of a head share two factors; mlp: M(z) = z + W1 silu(W2 z), Eq. 89."""
    projection_chunk: int = 64
    """Tokens between writes of the k, v, eta and alpha memories (Eq. 90)."""
    main_chunk: int = 64
    """Tokens between writes of the main memory; one chunk size must divide the other."""
    read: Literal["causal", "boundary"] = "causal"
    """causal: y_t = M_t q_t inside the chunk; boundary: the chunk-start state, Eq. 90 literally (0.36 nats worse)."""
    eta_max: float | None = None
    """Bound of the write rate eta; null: 1/4 for matrix, 1/16 for mlp."""
    alpha_bias: float | None = None
    """Initial bias of alpha's sigmoid; null: 4 for matrix (keeps 98 % per token, refreshed by the residual part), 8 for
    mlp, whose zero state is a fixed point: at 98 % it would be gone after some hundred tokens."""
    contribution: float = 0.3
    """Factor on the memory's part of every forward read, next to the static path (1.0 narrows the stable range)."""
    static: Literal["learned", "identity", "none"] = "learned"
    """Static path of the k and v reads: a learned map, the residual of Eq. 89, or nothing (diverges easily)."""
    normalise_values: bool = True
    """L2-normalise v as well as q and k; without it the loop v -> M v is quadratic in the state and diverges."""
    erase: Literal["layerwise", "input", "objective", "none"] = "layerwise"
    """What (alpha I - eta k k^T) of Eq. 88 means: every layer forgets along its own normalised input (layerwise),
    only the layer that sees k (input), a penalty 1/2 |M(k)|^2 in the objective (objective), or nothing."""
    momentum: float = 0.0
    """beta of S_t = beta S_{t-1} - eta_t G_t, M_t = M_{t-1}(...) + S_t; 0 is Eq. 88, Table 6 ablates it."""
    adaptive_query: bool = False
    """A memory for q too (Table 6: no gain); Section 8's text keeps q static."""
    expansion: int = 1
    """Hidden width of an mlp memory over the head width."""
    conv_width: int = 4
    """Taps of the causal depthwise convolution before the memory."""

    @property
    def eta_bound(self) -> float:
        return DEFAULT_ETA_MAX[self.kind] if self.eta_max is None else self.eta_max

    @property
    def alpha_bias_start(self) -> float:
        return DEFAULT_ALPHA_BIAS[self.kind] if self.alpha_bias is None else self.alpha_bias

    @property
    def window(self) -> int:
        """Tokens after which both memories are at a write boundary."""
        return max(self.projection_chunk, self.main_chunk)

    def problems(self, path: str) -> Iterator[Problem]:
        small, large = sorted((self.projection_chunk, self.main_chunk))
        if small < 1:
            yield (
                f"{path}.projection_chunk",
                f"chunks are {self.projection_chunk} and {self.main_chunk}",
                "16 to 128",
            )
        elif large % small:
            yield (
                f"{path}.main_chunk",
                f"main_chunk {self.main_chunk} and projection_chunk {self.projection_chunk}: one must divide the other",
                f"main_chunk {self.projection_chunk} or {2 * self.projection_chunk}",
            )
        if not 0 < self.eta_bound <= 1:
            yield f"{path}.eta_max", f"{self.eta_bound} is not in (0, 1]", f"{DEFAULT_ETA_MAX[self.kind]}"
        if not 0 <= self.momentum < 1:
            yield f"{path}.momentum", f"{self.momentum} is not in [0, 1)", "0.0 or 0.9"
        if self.expansion < 1:
            yield f"{path}.expansion", f"{self.expansion} is less than 1", "1 or 2"
        if self.conv_width < 1:
            yield f"{path}.conv_width", f"{self.conv_width} is less than 1", "4"
        if not 0 < self.contribution <= 1:
            yield f"{path}.contribution", f"{self.contribution} is not in (0, 1]", "0.3"

    def hazards(self) -> list[str]:
        """Settings that were seen to diverge, as sentences for a warning."""
        seen = []
        if self.eta_bound > STABLE_ETA_MAX[self.kind]:
            seen.append(f"eta_max {self.eta_bound:g} > {STABLE_ETA_MAX[self.kind]:g}: overflowed within 20 steps")
        if self.kind == "mlp" and self.contribution > 0.5 and self.eta_bound > 1 / 16:
            seen.append(
                f"mlp with contribution {self.contribution:g} and eta_max {self.eta_bound:g} > 1/16: overflowed"
            )
        if not self.normalise_values:
            seen.append("normalise_values false: states grew without bound at initialisation in 20 of 24 settings")
        if self.static == "none" and self.eta_bound > 1 / 64:
            seen.append(f"static none with eta_max {self.eta_bound:g} > 1/64: overflowed or did not learn")
        return seen


@dataclass
class CmsConfig:
    """Continuum memory system (Eq. 70-74): a chain of MLP blocks, each with its own clock."""

    variant: Literal["sequential", "independent"] = "sequential"
    """sequential: Eq. 70/73, one block after the other; independent: Eq. 74, a learned weighted sum."""
    periods: list[int] = field(default_factory=lambda: [1, 4])
    """Time between updates of each level, fastest first; its length is the number of levels."""
    unit: Literal["steps", "tokens"] = "steps"
    """What periods count: optimizer steps, or tokens (multiples of train.global_batch x train.seq_len)."""
    hidden: int | None = None
    """Hidden width of each level's SwiGLU; null: 8/3 width, divided over the levels, rounded to 16."""

    def problems(self, path: str) -> Iterator[Problem]:
        if not self.periods or min(self.periods) < 1:
            yield f"{path}.periods", f"{self.periods}: need at least one level, every period >= 1", "[1, 4]"
        elif self.periods != sorted(self.periods):
            yield f"{path}.periods", f"{self.periods} is not fastest first", f"{sorted(self.periods)}"
        if self.hidden is not None and self.hidden < 1:
            yield f"{path}.hidden", f"{self.hidden} is less than 1", "null"


@dataclass
class ModelConfig:
    """The trunk: embedding, `layers` blocks of width `width`, norm, head."""

    kind: Literal["hope", "hope_attention", "transformer"] = "hope"
    """hope: self-modifying Titans + CMS; hope_attention: softmax attention + CMS; transformer: Transformer++."""
    vocab_size: int = 8192
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    width: int = 384
    """Model width d."""
    layers: int = 8
    """Number of blocks."""
    heads: int = 6
    """Heads of the memory or the attention; width / heads is the size of one memory."""
    tie_embeddings: bool = True
    """Share the embedding with the output head."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding (attention kinds only; HOPE has none)."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Self-modifying memories (kind hope)."""
    cms: CmsConfig = field(default_factory=CmsConfig)
    """Continuum memory system (kinds hope and hope_attention)."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ModelConfig":
        """The section that `dataclasses.asdict` turned into `values`."""
        return cls(**{**values, "memory": MemoryConfig(**values["memory"]), "cms": CmsConfig(**values["cms"])})

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def periods(self) -> list[int]:
        """Clock of each level of MLPs: a Transformer++ has one level that moves at every step."""
        return [1] if self.kind == "transformer" else list(self.cms.periods)

    def hidden_per_level(self) -> int:
        """SwiGLU width of a level: all levels together cost as many parameters as one 4x MLP, 8 d^2."""
        if self.kind != "transformer" and self.cms.hidden is not None:
            return self.cms.hidden
        return max(16, 8 * self.width // 3 // len(self.periods) // 16 * 16)

    def problems(self, path: str = "model") -> Iterator[Problem]:
        for name in ("vocab_size", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                yield f"{path}.{name}", f"{getattr(self, name)} is less than 1", "a positive number"
        if min(self.width, self.heads) > 0 and self.width % self.heads:
            fits = [h for h in range(1, self.width + 1) if self.width % h == 0 and abs(h - self.heads) <= self.heads]
            yield (
                f"{path}.heads",
                f"width {self.width} is not a multiple of heads {self.heads}",
                "heads " + ", ".join(map(str, sorted(fits, key=lambda h: abs(h - self.heads))[:3])),
            )
        elif self.heads > 0 and self.kind != "hope" and self.head_dim % 2:
            yield (
                f"{path}.heads",
                f"head width {self.head_dim} is odd; rotary embedding needs pairs",
                "an even width",
            )
        if self.kind == "hope":
            yield from self.memory.problems(f"{path}.memory")
        if self.kind != "transformer":
            yield from self.cms.problems(f"{path}.cms")

    def warn_hazards(self) -> None:
        """Warn, once per setting, about choices that diverged when they were measured."""
        if self.kind == "hope":
            for sentence in self.memory.hazards():
                warnings.warn(f"model.memory: {sentence} (docs/results.md)", stacklevel=2)
