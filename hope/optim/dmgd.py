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
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures: gradients are given
        """One step of every group whose parameters are present; a parameter without gradient is left alone."""
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if not present:
                continue
            group["clock"] += 1
            gradients = self._collect(present, group)
            if gradients is not None:
                group["updates"] += 1
                self._update(present, gradients, group)

    def allocate_states(self) -> None:
        """Create all states as zeros that steps would create as they need them: a checkpoint saves and fills them."""
        for group in self.param_groups:
            self._state(group["params"], "memory")
            if self.config.preconditioner != "none":
                self._state(group["params"], "square")
            if group["period"] != 1:
                self._state(group["params"], "accumulator")

    def _state(self, params: list[Tensor], key: str) -> list[Tensor]:
        for p in params:
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p)
        return [self.state[p][key] for p in params]

    def _collect(self, params: list[Tensor], group: dict) -> list[Tensor] | None:
        """This step's gradients, or at a due step their means over the level's period, or None in between."""
        gradients = [p.grad for p in params if p.grad is not None]
        if group["grad_scale"] != 1.0:
            gradients = list(torch._foreach_mul(gradients, group["grad_scale"]))
        if group["period"] == 1:
            return gradients
        sums = self._state(params, "accumulator")
        torch._foreach_add_(sums, gradients, alpha=1.0 / group["period"])
        if group["clock"] % group["period"]:
            return None
        means = [total.clone() for total in sums]  # a copy: the accumulators start anew
        torch._foreach_zero_(sums)
        return means

    def _update(self, params: list[Tensor], gradients: list[Tensor], group: dict) -> None:
        config, rate, updates = self.config, group["lr"], group["updates"]
        l2 = config.objective == "l2"
        memories = self._state(params, "memory")
        torch._foreach_mul_(memories, config.beta1)
        torch._foreach_add_(memories, gradients, alpha=1 - config.beta1 if l2 else 1.0)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        if l2 and config.bias_correction:
            rate = rate / (1 - config.beta1**updates)
        if config.preconditioner == "none":
            torch._foreach_add_(params, memories, alpha=-rate)
            return
        squares = self._state(params, "square")
        torch._foreach_mul_(squares, config.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - config.beta2)
        scales = torch._foreach_sqrt(squares)
        if config.bias_correction:
            torch._foreach_div_(scales, (1 - config.beta2**updates) ** 0.5)
        torch._foreach_add_(scales, config.eps)
        torch._foreach_addcdiv_(params, memories, scales, value=-rate)
