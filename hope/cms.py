"""Continuum memory system (Eq. 70-74): MLP blocks with clocks of their own.

This file says what the blocks compute. Between two steps at which a level is due its weights do not move at all; that
is the optimizer's business (hope/optim/levels.py).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hope.config import ModelConfig
from hope.flops import Flops
from hope.layers import RMSNorm, SwiGlu
from hope.parameters import constant, new_parameter

NormAndBody = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Level(nn.Module):
    """One block of the chain: f(norm(x)), to be added to x; zeros while it is `silent`."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(width, eps=eps), SwiGlu(width, hidden)
        self.silent = False

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        norm, body = self.parts()
        return body(norm(x))

    def parts(self) -> NormAndBody:
        """(norm, f)."""
        return (nn.Identity(), torch.zeros_like) if self.silent else (self.norm, self.mlp)

    def flops(self) -> Flops:
        """Per token, forward."""
        return self.mlp.flops()


def _new_levels(config: ModelConfig) -> nn.ModuleList:
    hidden = config.hidden_per_level()
    return nn.ModuleList([Level(config.width, hidden, config.norm_eps) for _ in config.periods])


def _flops(levels: nn.ModuleList) -> Flops:
    total = Flops()
    for level in levels:
        assert isinstance(level, Level)
        total = total + level.flops()
    return total


class SequentialCms(nn.Module):
    """Eq. 70/73: y = x, then y <- y + f_l(norm_l(y)) from the fastest level to the slowest. [T, B, D] -> [T, B, D].

    The paper leaves norms and residuals out; with pre-norm residuals a level whose output is zero is the identity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.levels = _new_levels(config)

    def forward(self, x: Tensor) -> Tensor:
        """The whole chain, residuals included."""
        for level in self.levels:
            x = x + level(x)
        return x

    def sublayers(self) -> list[NormAndBody]:
        """(norm, f) of every level, each with a residual of its own."""
        return [level.parts() for level in self.levels]  # type: ignore[operator]

    def flops(self) -> Flops:
        return _flops(self.levels)


class IndependentCms(nn.Module):
    """Eq. 74: y = x + sum_l w_l f_l(norm_l(x)) with learned scalars w_l that start at 1. [T, B, D] -> [T, B, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.levels = _new_levels(config)
        count = len(config.periods)
        self.aggregate = new_parameter(count, init=constant(1.0), used="trunk", update="elementwise")

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum, residual included."""
        return x + self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        return torch.stack([level(x) for level in self.levels], -1) @ self.aggregate

    def sublayers(self) -> list[NormAndBody]:
        """One sublayer: the weighted sum. Each level has its norm inside."""
        return [(nn.Identity(), self._sum)]

    def flops(self) -> Flops:
        return _flops(self.levels)


@contextmanager
def without_level(modules: Iterable[nn.Module], number: int) -> Iterator[None]:
    """Inside the block, CMS level `number` of every block in these modules adds nothing: what is it worth?

    All ranks of a layout do it together: a silent level takes part in no collective.
    """
    chains = [
        part for module in modules for part in module.modules() if isinstance(part, SequentialCms | IndependentCms)
    ]
    levels = [chain.levels[number] for chain in chains]
    for level in levels:
        level.silent = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for level in levels:
            level.silent = False  # type: ignore[assignment]


def build_cms(config: ModelConfig) -> SequentialCms | IndependentCms:
    """The MLP part of a block; a Transformer++ has a chain of one level."""
    return IndependentCms(config) if config.cms.variant == "independent" else SequentialCms(config)
