"""Optimizer section of the configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Problem = tuple[str, str, str]


@dataclass
class OptimConfig:
    """Deep momentum gradient descent with a linear memory (Nested Learning, Section 4) and its schedule."""

    name: Literal["dmgd", "adamw"] = "dmgd"
    """dmgd: the choices below; adamw: the same code with objective l2, preconditioner adam and bias correction."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    warmup: int = 60
    """Steps of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the schedule after the warm-up, down to final_lr x lr at train.steps."""
    final_lr: float = 0.1
    """Learning rate at train.steps as a fraction of lr."""
    objective: Literal["dot", "l2"] = "l2"
    """Inner objective of the momentum memory: dot gives s = beta1 s + g (SGD momentum), l2 the moving average."""
    preconditioner: Literal["none", "adam"] = "adam"
    """Normaliser at the memory's output (Eq. 102, 105): nothing, or Adam's root mean square."""
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

    def problems(self, path: str = "optim") -> Iterator[Problem]:
        if not 0 < self.lr < math.inf:
            yield f"{path}.lr", f"{self.lr} is not a positive number", "1.5e-3"
        if self.warmup < 0:
            yield f"{path}.warmup", f"{self.warmup} is negative", "60"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{path}.{name}", f"{getattr(self, name)} is not in [0, 1)", "0.9"
        if not 0 <= self.final_lr <= 1:
            yield f"{path}.final_lr", f"{self.final_lr} is not in [0, 1]", "0.1"
        if self.eps <= 0:
            yield f"{path}.eps", f"{self.eps} is not positive", "1e-8"
        if self.weight_decay < 0:
            yield f"{path}.weight_decay", f"{self.weight_decay} is negative", "0.1"
        adam = (self.objective, self.preconditioner, self.bias_correction) == ("l2", "adam", True)
        if self.name == "adamw" and not adam:
            yield (
                f"{path}.name",
                f"adamw is objective l2, preconditioner adam and bias_correction true, not "
                f"{self.objective}, {self.preconditioner}, {self.bias_correction}",
                "optim.name=dmgd, or leave those three out",
            )
