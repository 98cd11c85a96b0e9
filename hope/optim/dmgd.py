"""Deep momentum gradient descent with a linear, value-less memory (Nested Learning, Eq. 33, 47, 102).

Momentum is an associative memory of gradients, trained online by gradient descent on an inner objective:

    dot   min <s, g>:                s <- beta1 s + g                      (Eq. 33-34: SGD with momentum)
    l2    min 1/2 |s - g|^2:         s <- beta1 s + (1 - beta1) g          (a moving average)

The normaliser, if any, is applied at the output: W <- W - lr s / (sqrt(v) + eps), v the average of g^2. With l2, the
Adam normaliser and bias correction this is AdamW (tested against torch). Signs: s is in gradient units and the
learning rate stays outside, so that a schedule does not change what the memory holds (the paper's m is -lr s).

Every operation is element-wise, so the optimizer may be given flat ZeRO partitions that cut across matrices.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from hope.optim.config import OptimConfig


class Dmgd(torch.optim.Optimizer):
    """One group per level and decay setting, as `hope.optim.levels.parameter_groups` makes them.

    Keys of a group that the caller may set before `step`: `lr`, and `grad_scale`, a factor on this step's gradient
    (global clipping). `period` is the level's clock: gradients are averaged over `period` steps and only then does
    anything of the group move: weights, decay, momentum, normaliser.
    """

    def __init__(self, groups: Iterable[dict], config: OptimConfig) -> None:
        self.config = config
        defaults = {
            "lr": config.lr,
            "grad_scale": 1.0,
            "weight_decay": 0.0,
            "period": 1,
            "clock": 0,
            "updates": 0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every group whose parameters are present; a parameter without gradient is left alone."""
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if not present:
                continue
            group["clock"] += 1
            due = group["clock"] % group["period"] == 0
            group["updates"] += int(due)
            for p in present:
                gradient = self._collect(p, group, due)
                if gradient is not None:
                    self._update(p, gradient, group)

    def _collect(self, p: Tensor, group: dict, due: bool) -> Tensor | None:
        """This step's gradient, or at a due step the mean over the level's period, or None while it accumulates."""
        gradient = p.grad if group["grad_scale"] == 1.0 else p.grad * group["grad_scale"]
        if group["period"] == 1:
            return gradient
        state = self.state[p]
        if "accumulator" not in state:
            state["accumulator"] = torch.zeros_like(p)
        state["accumulator"].add_(gradient, alpha=1.0 / group["period"])
        if not due:
            return None
        mean = state["accumulator"]
        state["accumulator"] = torch.zeros_like(p)
        return mean

    def _update(self, p: Tensor, gradient: Tensor, group: dict) -> None:
        config, state = self.config, self.state[p]
        if "memory" not in state:
            state["memory"] = torch.zeros_like(p)
            if config.preconditioner == "adam":
                state["square"] = torch.zeros_like(p)
        memory = state["memory"]
        l2 = config.objective == "l2"
        memory.mul_(config.beta1).add_(gradient, alpha=1 - config.beta1 if l2 else 1.0)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"]
        if l2 and config.bias_correction:
            rate = rate / (1 - config.beta1 ** group["updates"])
        if config.preconditioner == "none":
            p.add_(memory, alpha=-rate)
            return
        square = state["square"].mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        correction = 1 - config.beta2 ** group["updates"] if config.bias_correction else 1.0
        p.addcdiv_(memory, (square / correction).sqrt_().add_(config.eps), value=-rate)
