"""Optimizer section of the configuration."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hope.sections import Problem


@dataclass
class OptimConfig:
    """Deep momentum gradient descent (Nested Learning, Section 4; docs/optim.md), its relatives, and the schedule."""

    name: Literal["dmgd", "adamw", "muon", "m3"] = "dmgd"
    """dmgd: the choices below, element by element; adamw: the same code at AdamW's setting; muon (Eq. 42, 52) and m3
    (Algorithm 1): orthogonalised updates of whole matrices, and AdamW's setting for everything else."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    warmup: int = 60
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the schedule after the warm-up, down to final_lr x lr at train.steps."""
    final_lr: float = 0.1
    """Learning rate at train.steps as a fraction of lr."""
    memory: Literal["linear", "mlp"] = "linear"
    """Memory of gradients: linear, one number per weight; mlp: plus one small network per tensor, shared by all its
    coordinates and trained online on what the linear part leaves (tensors of two or more dimensions)."""
    objective: Literal["dot", "l2"] = "l2"
    """Inner objective of the memory: dot gives s = beta1 s + g (SGD momentum), l2 the moving average."""
    preconditioner: Literal["none", "adam"] = "adam"
    """Normaliser: nothing, or Adam's root mean square."""
    normalise: Literal["output", "value"] = "output"
    """Where the preconditioner acts: on what the memory gives (Eq. 102, 105), or on what it learns (Eq. 47)."""
    output: Literal["identity", "rms_clip", "rms_match"] = "identity"
    """rms_clip: every coordinate that the memory gives is bounded by output_bound x its tensor's gradient rms.
    rms_match: what an mlp gives is scaled, tensor by tensor, to the rms that the linear memory alone would have."""
    output_bound: float = 3.0
    """Bound of rms_clip."""
    erase: float = 0.0
    """Delta momentum (Eq. 49) element by element: s also forgets x / (1 + x), x = erase (g / rms)^2."""
    mlp_key: Literal["memory", "gradient"] = "memory"
    """What the mlp sees: the linear memory before this gradient, to predict it; or the gradient itself (Eq. 50)."""
    mlp_width: int = 8
    """Hidden width of the mlp."""
    mlp_lr: float = 0.1
    """Learning rate of the mlp's own weights, a fraction of the largest stable step; 0 leaves the memory linear."""
    mlp_decay: float = 0.3
    """Decay of the mlp's weights towards their initial values, per update. With 1e-3, runs of more than a few
    hundred steps ended worse than with a linear memory (docs/results.md)."""
    beta1: float = 0.9
    """Retention of the momentum memory."""
    beta2: float = 0.95
    """Retention of the squared-gradient average."""
    eps: float = 1e-8
    """Added to the root mean square."""
    bias_correction: bool = True
    """Divide both averages by 1 - beta^t (l2 objective)."""
    weight_decay: float = 0.1
    """Decoupled decay of tensors with two or more dimensions; applied only when their level is due."""
    period_gradient: Literal["mean", "sum"] = "mean"
    """What a CMS level's update sees at its due step: mean of the period's gradients, or their sum (Eq. 71)."""
    accumulate: Literal["sharded", "local"] = "sharded"
    """Gradients of a level that is not due: reduced every step into 1/dp of an accumulator, or kept on their device
    (4 bytes per weight of the level) and communicated once per period."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation (muon, m3)."""
    matrix_rms: float = 0.2
    """Root mean square of a matrix's update at learning rate 1 (muon, m3's ema reading), like AdamW's; 0: as it is."""
    m3_reading: Literal["ema", "literal"] = "ema"
    """literal: Algorithm 1 as printed, sums that never decay; ema: moving averages and an update of matrix_rms."""
    m3_slow_period: int = 16
    """Updates between two orthogonalisations of the slow memory (f)."""
    m3_alpha: float = 1.0
    """Weight of the slow memory's direction."""
    m3_beta3: float = 0.9
    """Retention of the slow memory (ema) or its factor (literal)."""

    def problems(self, path: str = "optim") -> Iterator[Problem]:
        if not 0 < self.lr < math.inf:
            yield Problem(f"{path}.lr", f"{self.lr} is not a positive number", "1.5e-3")
        if self.warmup < 0:
            yield Problem(f"{path}.warmup", f"{self.warmup} is negative", "60")
        for name in ("beta1", "beta2", "m3_beta3"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is not in [0, 1)", "0.9")
        if not 0 <= self.final_lr <= 1:
            yield Problem(f"{path}.final_lr", f"{self.final_lr} is not in [0, 1]", "0.1")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in ("eps", "output_bound"):
            if not getattr(self, name) > 0:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is not positive", str(defaults[name]))
        for name in ("weight_decay", "erase", "mlp_lr", "m3_alpha", "matrix_rms"):
            if not getattr(self, name) >= 0:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is negative", str(defaults[name]))
        for name in ("mlp_width", "newton_schulz_steps", "m3_slow_period"):
            if getattr(self, name) < 1:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is less than 1", str(defaults[name]))
        if self.mlp_lr > 1:
            yield Problem(f"{path}.mlp_lr", f"{self.mlp_lr} is more than the largest stable step", "0.1")
        if self.output == "rms_match" and self.memory == "linear":
            yield Problem(
                f"{path}.output", "rms_match scales an mlp to the linear memory, which is here alone", "identity"
            )
        if not 0 <= self.mlp_decay < 1:
            yield Problem(f"{path}.mlp_decay", f"{self.mlp_decay} is not in [0, 1)", "0.3")
        if self.name != "dmgd":
            yield from self._not_adamw(path)
        elif self.erase > 0 and self.objective == "l2" and self.bias_correction:
            what = f"erase {self.erase} changes what the average sums to, and bias_correction divides by 1 - beta1^t"
            yield Problem(f"{path}.erase", what, "optim.bias_correction=false, or optim.erase=0")

    def _not_adamw(self, path: str) -> Iterator[Problem]:
        """adamw, and the element-wise part of muon and m3, is one setting of dmgd."""
        adamw = {
            "memory": "linear", "objective": "l2", "preconditioner": "adam", "normalise": "output",
            "output": "identity", "erase": 0.0, "bias_correction": True,
        }  # fmt: skip
        found = {key: getattr(self, key) for key, value in adamw.items() if getattr(self, key) != value}
        if found:
            say = lambda settings: ", ".join(f"{key} {value}" for key, value in settings.items())
            what = f"{self.name} has {say({key: adamw[key] for key in found})}, not {say(found)}"
            yield Problem(f"{path}.name", what, "optim.name=dmgd, or leave these out")
