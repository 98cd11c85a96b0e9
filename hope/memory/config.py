"""The section of self-modifying mixers: every open choice of the paper (Nested Learning, Section 8).

Each comment gives the default's reason. Figures are held-out losses after 240 steps at 17-19M parameters, see
docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hope.sections import MixerSection, Problem, only_if

# The largest eta_max that trained with the memory's contribution scaled to 0.3; above, gradients overflow.
STABLE_ETA_MAX = {"matrix": 0.25, "mlp": 0.25}
DEFAULT_ETA_MAX = {"matrix": 0.25, "mlp": 0.0625}
DEFAULT_ALPHA_BIAS = {"matrix": 4.0, "mlp": 8.0}


@dataclass
class MemoryConfig(MixerSection):
    """Self-modifying Titans (Eq. 83-91): memories k, v, eta, alpha and main of every head."""

    memory: Literal["matrix", "mlp"] = "matrix"
    """matrix: M(z) = z + M z, all memories of a head share their factors; mlp: M(z) = z + W1 silu(W2 z), Eq. 89."""
    forget: Literal["initial", "zero"] = "initial"
    """What alpha forgets towards. initial: the meta-learned initial state, M = M_0 + D with D forgotten, so that
    memories stay distinct; zero: Eq. 88 literally, where M_0 itself is gone after some hundred tokens."""
    projection_chunk: int = 64
    """Tokens between writes of the k, v, eta and alpha memories (Eq. 90)."""
    main_chunk: int = 64
    """Tokens between writes of the main memory; one chunk size must divide the other."""
    read: Literal["causal", "boundary"] = "causal"
    """causal: y_t = M_t q_t inside the chunk; boundary: the chunk-start state, Eq. 90 literally (0.36 nats worse)."""
    eta_max: float | None = None
    """Bound of the write rate eta; null: 1/4 for matrix, 1/16 for mlp."""
    alpha_bias: float | None = None
    """Initial bias of alpha's sigmoid; null: 4 for matrix (keeps 98 % per token), 8 for mlp, whose zero state is a
    fixed point: with `forget: zero` and 98 % it would be gone after some hundred tokens."""
    alpha_spread: float = 0.0
    """Heads start with biases of alpha from alpha_bias - this to alpha_bias + this, in even steps. A bias b keeps a
    write for about e^b tokens, so horizons are log-uniform, as Gated DeltaNet's (Yang et al., 2025). 0: all alike."""
    contribution: float = 0.3
    """Factor on the memory's part of every forward read, next to the static path (1.0 narrows the stable range)."""
    static: Literal["learned", "projected", "identity", "none"] = "projected"
    """Static path of the k and v reads. learned: a map per head of the memory's input; projected: a projection of the
    full width with a convolution each, normalised, as in delta-rule models (learned cost 0.11 nats under Muon, nothing
    beside attention: docs/results.md); identity: the residual of Eq. 89; none: nothing (diverges easily)."""
    normalise_values: bool = True
    """L2-normalise v as well as q and k; without it the loop v -> M v is quadratic in the state and diverges."""
    erase: Literal["layerwise", "input", "objective", "none"] = "layerwise"
    """What (alpha I - eta k k^T) of Eq. 88 means: every layer forgets along its own normalised input (layerwise),
    only the layer that sees k (input), a penalty 1/2 |M(k)|^2 in the objective (objective), or nothing."""
    erase_max: float | None = None
    """Bound of an erase rate of its own, alpha_t erase_max sigmoid(8 w.x_t + b), which stands for eta in
    (alpha I - eta k k^T). Above 1 that matrix can have negative eigenvalues, which state tracking needs (Grazzi et al.,
    2024); below 2 none leaves (-1, 1). null: the write rate erases, Eq. 88."""
    momentum: float = 0.0
    """beta of S_t = beta S_{t-1} - eta_t G_t, M_t = M_{t-1}(...) + S_t; 0 is Eq. 88, Table 6 ablates it."""
    self_made: Literal["all", "not_k", "not_v", "gates"] = "all"
    """What memories take part in making. all: k, v, eta and alpha; not_k, not_v: that one comes from its static path
    alone; gates: both do (Table 6 ablates each)."""
    adaptive_query: bool = False
    """A memory for q too (Table 6: no gain); Section 8's text keeps q static."""
    expansion: int = only_if("memory", "mlp", default=1)
    """Hidden width of an mlp memory over the head width."""
    conv_width: int = 4
    """Taps of the causal depthwise convolution before the memory."""
    output_gate: Literal["silu", "sigmoid"] = "sigmoid"
    """What the gate of the output goes through: under Muon silu cost 0.26 nats, with attention in every fourth layer
    0.07 (docs/results.md)."""
    kernel: Literal["auto", "plain"] = "auto"
    """auto: the fastest forms that fit, of the loop and of what cuts its input into heads and merges its output; plain:
    PyTorch's, to compare with."""

    @property
    def boxes(self) -> tuple[str, ...]:
        """The memories beside main, in the order of their reads."""
        left_out = {"all": "", "not_k": "k", "not_v": "v", "gates": "kv"}[self.self_made]
        own = ("k", "v", "eta", "alpha", *(("q",) if self.adaptive_query else ()))
        return tuple(box for box in own if box not in left_out)

    @property
    def eta_bound(self) -> float:
        return DEFAULT_ETA_MAX[self.memory] if self.eta_max is None else self.eta_max

    @property
    def alpha_bias_start(self) -> float:
        return DEFAULT_ALPHA_BIAS[self.memory] if self.alpha_bias is None else self.alpha_bias

    @property
    def window(self) -> int:
        """Tokens after which both memories are at a write boundary."""
        return max(self.projection_chunk, self.main_chunk)

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        small, large = sorted((self.projection_chunk, self.main_chunk))
        if small < 1:
            yield Problem(
                f"{path}.projection_chunk",
                f"chunks are {self.projection_chunk} and {self.main_chunk}",
                "16 to 128",
            )
        elif large % small:
            yield Problem(
                f"{path}.main_chunk",
                f"main_chunk {self.main_chunk} and projection_chunk {self.projection_chunk}: one must divide the other",
                f"main_chunk {self.projection_chunk} or {2 * self.projection_chunk}",
            )
        if not 0 < self.eta_bound <= 1:
            yield Problem(f"{path}.eta_max", f"{self.eta_bound} is not in (0, 1]", f"{DEFAULT_ETA_MAX[self.memory]}")
        if self.alpha_spread < 0:
            yield Problem(f"{path}.alpha_spread", f"{self.alpha_spread} is negative", "0.0, or 2.0")
        yield from self._erase_problems(f"{path}.erase_max")
        if self.self_made != "all" and self.static == "none":
            what = f"{self.self_made} leaves nothing that makes k or v: there is no static path"
            yield Problem(f"{path}.self_made", what, f"all, or {path}.static=projected")
        if not 0 <= self.momentum < 1:
            yield Problem(f"{path}.momentum", f"{self.momentum} is not in [0, 1)", "0.0 or 0.9")
        if self.expansion < 1:
            yield Problem(f"{path}.expansion", f"{self.expansion} is less than 1", "1 or 2")
        if self.conv_width < 1:
            yield Problem(f"{path}.conv_width", f"{self.conv_width} is less than 1", "4")
        if not 0 < self.contribution <= 1:
            yield Problem(f"{path}.contribution", f"{self.contribution} is not in (0, 1]", "0.3")

    def _erase_problems(self, path: str) -> Iterator[Problem]:
        if self.erase_max is None:
            return
        if self.erase not in ("layerwise", "input"):
            what = f"{self.erase_max} bounds a rate of erasing, and with erase {self.erase} nothing is erased"
            yield Problem(path, what, "null, or erase layerwise")
        elif not 0 < self.erase_max < 2:
            yield Problem(
                path, f"{self.erase_max} is not in (0, 2): eigenvalues must stay inside (-1, 1)", "1.0, or 1.9"
            )

    def hazards(self) -> list[str]:
        """Settings that were seen to diverge, as sentences for a warning."""
        seen = []
        if self.eta_bound > STABLE_ETA_MAX[self.memory]:
            seen.append(f"eta_max {self.eta_bound:g} > {STABLE_ETA_MAX[self.memory]:g}: overflowed within 20 steps")
        if self.memory == "mlp" and self.contribution > 0.5 and self.eta_bound > 1 / 16:
            seen.append(
                f"mlp with contribution {self.contribution:g} and eta_max {self.eta_bound:g} > 1/16: overflowed"
            )
        if not self.normalise_values:
            seen.append("normalise_values false: states grew without bound at initialisation in 20 of 24 settings")
        if self.static == "none" and self.eta_bound > 1 / 64:
            seen.append(f"static none with eta_max {self.eta_bound:g} > 1/64: overflowed or did not learn")
        return seen
