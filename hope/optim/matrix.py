"""Optimizers of whole matrices: Muon (Eq. 42, 52) and M3 (Algorithm 1); all other tensors at AdamW's setting of DMGD.

Muon is DMGD whose output nonlinearity is an orthogonalisation. Its memory may be deep too, `optim.muon.memory`:

    m <- EMA(g);  d = m + r y(k), or m (1 + rho);  O = NS(lerp(g, d, beta1))

y, rho and r as in `hope.optim.dmgd`, trained on 1/2 |d - g|^2 before the write.

M3 adds a second, slow memory with a clock of its own:

    every f updates:  M2 <- M2 + beta3 sum of the last f gradients;  O2 <- NS(M2)
    every update:     M1 <- M1 + beta1 g;  V <- V + beta2 g^2;  W <- W - lr (NS(M1) + alpha O2) / (sqrt(V) + eps)

as printed, which only ever adds (`reading: literal`); in the `ema` reading M1, V and M2 are moving averages (M2 of
the chunks' mean gradients). Dividing an orthogonal matrix by sqrt(V) leaves a step whose size is one over the
gradient's: the ema reading scales it to a root mean square of `matrix_rms`, so that it takes AdamW's learning rates.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hope.optim import newton_schulz
from hope.optim.clocks import Due
from hope.optim.config import DmgdConfig, OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.kernels import stretches
from hope.optim.momentum import beta1_of, beta2_of
from hope.optim.rules import Rates, Stretch, answer, measure


class MatrixOptimizer(Dmgd):
    """Groups with `matrices` true hold whole matrices [n, m] or stacks of them [H, n, m], one tensor per parameter.
    Where such a group has `head_rows`, its matrices are taken a head at a time, [head_rows, m] each.

    `half`: orthogonalise with bf16 products on a GPU; false for runs in fp32, whose layouts agree to fp32's rounding.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig, half: bool = False) -> None:
        super().__init__(groups, config)
        self.half = half
        linear = DmgdConfig(preconditioner="none", bias_correction=False)
        memory = config.muon.momentum if config.name == "muon" else linear
        self._of_matrices = dataclasses.replace(config, name="dmgd", dmgd=memory)

    def settings(self, group: dict[str, Any]) -> OptimConfig:
        return self._of_matrices if group["matrices"] else self.config

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        if not group["matrices"]:
            return super().state_keys(group)
        slow = ("square", "slow_sum", "slow", "slow_direction")
        return ("memory", *slow) if self.config.name == "m3" else ("memory",)

    def update(self, due: Due) -> None:
        nets = self._teach(due)
        self._move([(group, params) for group, params in due if not group["matrices"]], nets)
        for group, params in due:
            if group["matrices"] and params:
                self._update_matrices(group, params, nets)

    def _update_matrices(self, group: dict[str, Any], params: list[Tensor], nets: dict[Tensor, Tensor]) -> None:
        scale = self.gradient_factor(group) * group["grad_scale"]
        gradients = [p.grad for p in params if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        before = [m.clone() for m in self.states(params, "memory")] if self.watching(group) else []
        update = self._m3 if self.config.name == "m3" else self._muon
        directions = update(group, params, gradients)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, directions, alpha=-group["lr"])
        for i, old in enumerate(before):
            self._measure_matrix(group, params[i], old, directions[i] * group["lr"], nets)

    def _muon(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Nesterov momentum, orthogonalised; sqrt(max(n, m)) undoes the size of an orthogonal matrix's entries."""
        beta1, memories = beta1_of(self.config, group), self.states(params, "memory")
        if self.rule(group).learns:
            memories = [self._deep(group, p) for p in params]
        else:
            torch._foreach_lerp_(memories, gradients, 1 - beta1)
        ahead = _blocks(group, torch._foreach_lerp(gradients, memories, beta1))
        found = self._orthogonal(ahead)
        if rms := self.config.muon.matrix_rms:
            torch._foreach_mul_(found, [rms * max(block.shape[-2:]) ** 0.5 for block in ahead])
        return [out.view_as(p) for out, p in zip(found, params, strict=True)]

    def _m3(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        m3, ema = self.config.m3, self.config.m3.reading == "ema"
        beta1, beta2 = beta1_of(self.config, group), beta2_of(self.config, group)
        states = (_blocks(group, self.states(params, key)) for key in self.state_keys(group))
        memories, squares, sums, slow, direction = states
        gradients = _blocks(group, gradients)
        if (group["updates"] - 1) % m3.slow_period == 0:  # the chunk before this update has ended
            torch._foreach_mul_(slow, m3.beta3 if ema else 1.0)
            factor = (1 - m3.beta3) / m3.slow_period if ema else m3.beta3
            torch._foreach_add_(slow, sums, alpha=factor)
            torch._foreach_zero_(sums)
            torch._foreach_copy_(direction, self._orthogonal(slow))
        torch._foreach_add_(sums, gradients)
        torch._foreach_mul_(memories, beta1 if ema else 1.0)
        torch._foreach_add_(memories, gradients, alpha=1 - beta1 if ema else beta1)
        torch._foreach_mul_(squares, beta2 if ema else 1.0)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2 if ema else beta2)
        found = self._orthogonal(memories)
        torch._foreach_add_(found, direction, alpha=m3.alpha)
        for out, square in zip(found, squares, strict=True):
            out.div_(square.sqrt().add_(self.config.eps))
            if ema and m3.matrix_rms:
                out.mul_(m3.matrix_rms / (out.square().mean((-2, -1), keepdim=True).sqrt() + 1e-30))
        return [out.view_as(p) for out, p in zip(found, params, strict=True)]

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        half = self.half and matrices[0].is_cuda  # a CPU gains nothing
        return newton_schulz.orthogonalise_all(matrices, self.config.matrices.newton_schulz_steps, half)

    def _deep(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Write a gradient, which is scaled already, into a deep memory, and what this gives, of p's shape."""
        rule, c = self.rule(group), Rates.of(self.settings(group), group, 1.0)
        x, whole = self._stretch(p, rule), self._whole(p, rule).of(0)
        parts = [answer(rule, part, c, whole)[0] for _, part in stretches(x, self._layout(p))]
        return torch.cat(parts).view_as(p)

    def _measure_matrix(
        self, group: dict[str, Any], p: Tensor, before: Tensor, moved: Tensor, nets: dict[Tensor, Tensor]
    ) -> None:
        """`update^2` is that of the direction, without weight decay."""
        rule, c = self.rule(group), Rates.of(self.settings(group), group, 1.0)
        x, whole = self._stretch(p, rule), self._whole(p, rule).of(0)
        was = Stretch(x.p + moved.view(-1), before.view(-1), None, x.g)
        parts = zip(stretches(was, self._layout(p)), stretches(x, self._layout(p)), strict=True)
        found = [measure(rule, old, new, c, nets[p][0], whole) for (_, old), (_, new) in parts]
        self.measured[p] = torch.stack(found).sum(0, keepdim=True)


def _blocks(group: dict[str, Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is orthogonalised by itself, as views: the tensors, or of each [n, m] a stack [heads, head_rows, m]."""
    rows = group["head_rows"]
    return [t.view(-1, rows, t.shape[-1]) for t in tensors] if rows else list(tensors)
