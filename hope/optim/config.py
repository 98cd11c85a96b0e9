"""Optimizer section of the configuration: shared keys, and a section of its own for each kind that has choices."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hope.optim.group_config import GroupConfig, beta_problems
from hope.sections import Problem, only_if

NETWORKS = ("mlp", "mlp_only")
"""Memories of gradients with a network."""


@dataclass
class MlpConfig:
    """The network of a deep memory of gradients, one per tensor, shared by its coordinates and trained online."""

    key: Literal["memory", "gradient"] = "memory"
    """What it sees: the linear memory before this gradient, to predict it; or the gradient itself (Eq. 50)."""
    width: int = 8
    """Hidden width."""
    lr: float = 0.1
    """Learning rate of its weights, a fraction of the largest stable step; 0 leaves the memory linear."""
    decay: float = 0.3
    """Decay of its weights towards their initial values, per update. With 1e-3, runs of more than a few hundred steps
    ended worse than with a linear memory (docs/results.md)."""

    def problems(self, path: str) -> Iterator[Problem]:
        """What cannot work, by key below `path`."""
        if self.width < 1:
            yield Problem(f"{path}.width", f"{self.width} is less than 1", "8")
        yield from _learner_problems(self, path)


@dataclass
class ScalarConfig:
    """One gain per tensor in place of a network, trained in the same way: what a network does beyond it is depth."""

    lr: float = 0.1
    """Step towards the best gain for this gradient, sum (w - s) s / sum s^2, as a fraction of the way."""
    decay: float = 0.3
    """Decay of the gain towards 0, per update. With lr 1 and decay 0 it is the best one."""

    def problems(self, path: str) -> Iterator[Problem]:
        """What cannot work, by key below `path`."""
        yield from _learner_problems(self, path)


def _learner_problems(config: MlpConfig | ScalarConfig, path: str) -> Iterator[Problem]:
    if not config.lr >= 0:
        yield Problem(f"{path}.lr", f"{config.lr} is negative", "0.1")
    elif config.lr > 1:
        yield Problem(f"{path}.lr", f"{config.lr} is more than the largest stable step", "0.1")
    if not 0 <= config.decay < 1:
        yield Problem(f"{path}.decay", f"{config.decay} is not in [0, 1)", "0.3")


@dataclass
class DmgdConfig:
    """Deep momentum gradient descent (Nested Learning, Section 4; docs/optim.md). The defaults are AdamW's setting."""

    memory: Literal["linear", "mlp", "scalar", "mlp_only"] = "linear"
    """Memory of gradients: linear, one number per weight; mlp: plus one small network per tensor, trained on what the
    linear part leaves; scalar: times one gain per tensor, trained likewise; mlp_only: the network alone (Eq. 50).
    Tensors with one dimension have a linear one."""
    objective: Literal["dot", "l2"] = "l2"
    """Inner objective of the memory: dot gives s = beta1 s + g (SGD momentum), l2 the moving average."""
    preconditioner: Literal["none", "adam"] = "adam"
    """Normaliser: nothing, or Adam's root mean square."""
    normalise: Literal["output", "value"] = only_if("preconditioner", "adam", default="output")
    """Where the preconditioner acts: on what the memory gives (Eq. 102, 105), or on what it learns (Eq. 47)."""
    output: Literal["identity", "rms_clip", "rms_match"] = "identity"
    """rms_clip: every coordinate that the memory gives is bounded by output_bound x its tensor's gradient rms.
    rms_match: what an mlp gives is scaled, tensor by tensor, to the rms that the linear memory alone would have, and
    what mlp_only gives to the rms of the gradient that it answers."""
    output_bound: float = only_if("output", "rms_clip", default=3.0)
    """Bound of rms_clip."""
    erase: float = 0.0
    """Delta momentum (Eq. 49) element by element: s also forgets x / (1 + x), x = erase (g / rms)^2."""
    bias_correction: bool = True
    """Divide both averages by 1 - beta^t (of s with the l2 objective only)."""
    mlp: MlpConfig = only_if("memory", *NETWORKS, factory=MlpConfig)
    """The network of memory mlp and mlp_only."""
    scalar: ScalarConfig = only_if("memory", "scalar", factory=ScalarConfig)
    """The gain of memory scalar."""

    @property
    def learner(self) -> MlpConfig | ScalarConfig:
        """How the network, or the gain, is trained."""
        return self.scalar if self.memory == "scalar" else self.mlp

    def problems(self, path: str) -> Iterator[Problem]:
        """What cannot work, by key below `path`."""
        if not self.output_bound > 0:
            yield Problem(f"{path}.output_bound", f"{self.output_bound} is not positive", "3.0")
        if self.output == "rms_match" and self.memory not in NETWORKS:
            alone = "is here alone" if self.memory == "linear" else "would take back all that a scalar does"
            what = f"rms_match scales an mlp to the linear memory, which {alone}"
            yield Problem(f"{path}.output", what, "identity")
        if not self.erase >= 0:
            yield Problem(f"{path}.erase", f"{self.erase} is negative", "0.0")
        elif self.erase > 0 and self.objective == "l2" and self.bias_correction:
            what = f"erase {self.erase} changes what the average sums to, and bias_correction divides by 1 - beta1^t"
            yield Problem(f"{path}.erase", what, f"{path}.bias_correction=false, or {path}.erase=0")
        if self.memory in NETWORKS:
            yield from self.mlp.problems(f"{path}.mlp")
        if self.memory == "mlp_only":
            yield from self._alone_problems(path)
        if self.memory == "scalar":
            yield from self.scalar.problems(f"{path}.scalar")
            if self.objective == "dot" and not self.scalar.decay:
                what = "0 lets the gain grow without bound: the objective dot has no minimum"
                yield Problem(f"{path}.scalar.decay", what, "0.3, or objective=l2")

    def _alone_problems(self, path: str) -> Iterator[Problem]:
        if self.mlp.key != "gradient":
            what = f"{self.mlp.key} is no key: memory mlp_only has no linear memory to look at"
            yield Problem(f"{path}.mlp.key", what, "gradient")
        if self.erase > 0:
            yield Problem(f"{path}.erase", f"{self.erase} erases nothing: mlp_only has no linear memory", "0.0")


@dataclass
class MuonConfig:
    """Orthogonalised momentum of whole matrices (Eq. 42, 52); everything else has AdamW's setting."""

    memory: Literal["linear", "mlp", "scalar"] = "linear"
    """Momentum of a matrix: linear, a moving average; mlp: plus a small network, as of optim.dmgd.memory, then
    orthogonalised; scalar: times one gain. The gain changes only how much this gradient counts beside the momentum."""
    mlp: MlpConfig = only_if("memory", "mlp", factory=MlpConfig)
    """The network of memory mlp."""
    scalar: ScalarConfig = only_if("memory", "scalar", factory=ScalarConfig)
    """The gain of memory scalar."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    matrix_rms: float = 0.2
    """Root mean square of a matrix's update at learning rate 1, like AdamW's; 0: as it is."""
    per_head: bool = False
    """Orthogonalise maps whose rows belong to heads (query, key, value, input) a head at a time, not whole."""

    def problems(self, path: str) -> Iterator[Problem]:
        """What cannot work, by key below `path`."""
        yield from _matrix_problems(self, path)
        if self.memory != "linear":
            yield from self.momentum.learner.problems(f"{path}.{self.memory}")

    @property
    def momentum(self) -> DmgdConfig:
        """The memory of a whole matrix as one of dmgd: in units of the gradient's rms, no average corrected."""
        return DmgdConfig(
            memory=self.memory, preconditioner="none", bias_correction=False, mlp=self.mlp, scalar=self.scalar
        )


@dataclass
class M3Config:
    """Two orthogonalised momenta of whole matrices (Algorithm 1); everything else has AdamW's setting."""

    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    reading: Literal["ema", "literal"] = "ema"
    """literal: Algorithm 1 as printed, sums that never decay; ema: moving averages and an update of matrix_rms."""
    matrix_rms: float = only_if("reading", "ema", default=0.2)
    """Root mean square of a matrix's update at learning rate 1, like AdamW's; 0: as it is."""
    per_head: bool = False
    """Orthogonalise maps whose rows belong to heads (query, key, value, input) a head at a time, not whole."""
    slow_period: int = 16
    """Updates between two orthogonalisations of the slow memory (f)."""
    alpha: float = 1.0
    """Weight of the slow memory's direction."""
    beta3: float = 0.9
    """Retention of the slow memory (ema) or its factor (literal)."""

    def problems(self, path: str) -> Iterator[Problem]:
        """What cannot work, by key below `path`."""
        yield from _matrix_problems(self, path)
        if self.slow_period < 1:
            yield Problem(f"{path}.slow_period", f"{self.slow_period} is less than 1", "16")
        if not self.alpha >= 0:
            yield Problem(f"{path}.alpha", f"{self.alpha} is negative", "1.0")
        if not 0 <= self.beta3 < 1:
            yield Problem(f"{path}.beta3", f"{self.beta3} is not in [0, 1)", "0.9")


def _matrix_problems(config: MuonConfig | M3Config, path: str) -> Iterator[Problem]:
    if config.newton_schulz_steps < 1:
        yield Problem(f"{path}.newton_schulz_steps", f"{config.newton_schulz_steps} is less than 1", "5")
    if not config.matrix_rms >= 0:
        yield Problem(f"{path}.matrix_rms", f"{config.matrix_rms} is negative", "0.2")


@dataclass
class OptimConfig:
    """The optimizer by name, the keys that all of them share, and the schedule."""

    name: Literal["dmgd", "adamw", "muon", "m3"] = "dmgd"
    """dmgd: the choices of optim.dmgd, element by element; adamw: the same code at AdamW's setting; muon and m3:
    orthogonalised updates of whole matrices, and AdamW's setting for everything else."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    lr_elementwise: float | None = None
    """Peak rate of what declares an element-wise update: embedding, head, gates, convolutions, norms; and under muon
    and m3 of all that is no matrix. null: lr."""
    level_rate: float = 0.0
    """Exponent g: a CMS level that is due every C steps has its rate times C^g. 0: the same rate for every level."""
    warmup: int | float = 60
    """Linear warm-up: steps, or in (0, 1) a fraction of the run."""
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the schedule after the warm-up, down to final_lr x lr at the last step; wsd: constant (stable), then a
    decay over the last decay_length."""
    decay_length: int | float = only_if("decay", "wsd", default=0.2)
    """The decay of wsd, which ends at the last step: steps, or in (0, 1) a fraction of the run."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = only_if("decay", "wsd", default="linear")
    """Shape of the decay of wsd: linear, half a cosine, or sqrt, 1 - sqrt(done), which falls fastest at first."""
    final_lr: float = only_if("decay", "cosine", "linear", "wsd", default=0.1)
    """Learning rate at the last step as a fraction of lr."""
    beta1: float = 0.9
    """Retention of the momentum memory. 1 with the objective dot alone: a sum of all gradients (Eq. 34)."""
    momentum_warmup: int = 0
    """Steps over which beta1 rises linearly from beta1_start; 0: none. Counted by each level's clock."""
    beta1_start: float = only_if("momentum_warmup", default=0.85)
    """beta1 of the first step."""
    beta2: float = only_if("dmgd.preconditioner", "adam", default=0.95)
    """Retention of the squared-gradient average."""
    eps: float = only_if("dmgd.preconditioner", "adam", default=1e-8)
    """Added to the root mean square."""
    weight_decay: float = 0.1
    """Decoupled decay of tensors with two or more dimensions; applied only when their level is due."""
    period_gradient: Literal["mean", "sum"] = "mean"
    """What a CMS level's update sees at its due step: mean of the period's gradients, or their sum (Eq. 71)."""
    accumulate: Literal["sharded", "local"] = "sharded"
    """Gradients of a level that is not due: reduced every step into 1/dp of an accumulator, or kept on their device
    (4 bytes per weight of the level) and communicated once per period."""
    groups: list[GroupConfig] = field(default_factory=list)
    """[{match: "blocks.*.mixer.query.*", rate: 2.0}, ...]: exceptions by pattern of parameter names. Of several that
    match, the first counts."""
    dmgd: DmgdConfig = only_if("name", "dmgd", factory=DmgdConfig)
    """The choices of dmgd."""
    muon: MuonConfig = only_if("name", "muon", factory=MuonConfig)
    """The choices of muon."""
    m3: M3Config = only_if("name", "m3", factory=M3Config)
    """The choices of m3."""

    @property
    def elementwise(self) -> DmgdConfig:
        """What is done element by element: dmgd's choices, or AdamW's setting, which is dmgd's default."""
        return self.dmgd if self.name == "dmgd" else DmgdConfig()

    @property
    def matrices(self) -> MuonConfig | M3Config:
        """The choices for whole matrices, of muon or m3."""
        return self.m3 if self.name == "m3" else self.muon

    @property
    def sums(self) -> bool:
        """Whether every momentum is a sum that beta1 multiplies, so that beta1 may be 1, and no average."""
        return self.name == "dmgd" and self.dmgd.objective == "dot"

    def problems(self, path: str = "optim") -> Iterator[Problem]:
        """What cannot work, by key below `path`; of the kinds' sections only the chosen one counts."""
        if not 0 < self.lr < math.inf:
            yield Problem(f"{path}.lr", f"{self.lr} is not a positive number", "1.5e-3")
        if self.lr_elementwise is not None and not 0 < self.lr_elementwise < math.inf:
            yield Problem(f"{path}.lr_elementwise", f"{self.lr_elementwise} is not a positive number", "null, for lr")
        if not -2 <= self.level_rate <= 2:
            yield Problem(f"{path}.level_rate", f"{self.level_rate} is not in [-2, 2]", "0.5")
        yield from _length_problems(f"{path}.warmup", self.warmup, least=0, fix="60, or 0.05 of the run")
        if self.decay == "wsd":
            yield from _length_problems(f"{path}.decay_length", self.decay_length, least=1, fix="0.2 of the run")
        yield from beta_problems(path, self.beta1, self.beta2, self.sums)
        yield from self._momentum_problems(path)
        if not 0 <= self.final_lr <= 1:
            yield Problem(f"{path}.final_lr", f"{self.final_lr} is not in [0, 1]", "0.1")
        if not self.eps > 0:
            yield Problem(f"{path}.eps", f"{self.eps} is not positive", "1e-08")
        if not self.weight_decay >= 0:
            yield Problem(f"{path}.weight_decay", f"{self.weight_decay} is negative", "0.1")
        for number, group in enumerate(self.groups):
            yield from group.problems(f"{path}.groups[{number}]", self.sums, last=number == len(self.groups) - 1)
        if self.name == "dmgd":
            yield from self.dmgd.problems(f"{path}.dmgd")
        elif self.name != "adamw":
            yield from self.matrices.problems(f"{path}.{self.name}")

    def _momentum_problems(self, path: str) -> Iterator[Problem]:
        if self.momentum_warmup < 0:
            yield Problem(f"{path}.momentum_warmup", f"{self.momentum_warmup} is negative", "0, or 300")
        elif self.momentum_warmup:
            betas = {f"{path}.beta1": self.beta1}
            own = {f"{path}.groups[{i}].beta1": group.beta1 for i, group in enumerate(self.groups)}
            betas |= {where: beta1 for where, beta1 in own.items() if beta1 is not None}
            for where, beta1 in betas.items():
                if not 0 <= self.beta1_start <= beta1:
                    what = f"{self.beta1_start} is not in [0, {beta1}], up to {where}, to which it rises"
                    yield Problem(f"{path}.beta1_start", what, f"at most {beta1}")


def _length_problems(path: str, value: float, least: int, fix: str) -> Iterator[Problem]:
    """Of a number of steps, or a fraction of the run in (0, 1)."""
    if not least <= value < math.inf and not 0 < value < 1:
        yield Problem(path, f"{value} is neither a number of steps nor a fraction in (0, 1)", fix)
    elif value > 1 and value != int(value):
        yield Problem(path, f"{value} is no whole number of steps", f"nearest: {int(value)}, {int(value) + 1}")
