"""Continuum memory system (Eq. 70-74): MLP blocks with clocks of their own.

This file says what the blocks compute, and in which order. Levels in context, rewritten inside the sequence, come first
(`hope.in_context`). Of the others, between two steps at which a level is due its weights do not move at all; that is
the optimizer's business (hope/optim/levels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hope.config import ModelConfig
from hope.documents import Documents
from hope.flops import Flops
from hope.in_context import InContextLevel
from hope.layers import RMSNorm, SwiGlu
from hope.memory.in_context_config import Sizes
from hope.mixers import State
from hope.parameters import constant, new_parameter
from hope.sublayer import Sublayer, stateless

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


class Cms(nn.Module):
    """Base of the two ways to put levels together. [T, B, D] -> [T, B, D], residuals included, of sequences that begin
    here.

    Attributes:
        levels: on the optimizer's clock, fastest first.
        in_context: rewritten inside the sequence, before those; nested ones are one module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width, eps = config.hidden_per_level(), config.width, config.norm_eps
        self.levels = nn.ModuleList([Level(width, hidden, eps) for _ in config.periods])
        sizes = lambda group: Sizes.of(group[0], width, config.heads)
        self.in_context = nn.ModuleList(
            InContextLevel(width, group, sizes(group), eps, f"in_context{number}")
            for number, group in enumerate(config.cms.groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        """All levels."""
        for sublayer in self.sublayers():
            x = x + sublayer(x, None, None)[0]
        return x

    def sublayers(self) -> list[Sublayer]:
        """In order, each with a residual of its own."""
        raise NotImplementedError

    def fast(self) -> list[InContextLevel]:
        """`in_context`, typed."""
        return list(self.in_context)  # type: ignore[arg-type]

    def flops(self, length: int) -> Flops:
        """Per token, forward, at this sequence length."""
        slow = sum((level.flops() for level in self.levels), Flops())  # type: ignore[operator]
        return sum((level.mlp.flops(length) for level in self.fast()), slow)


class SequentialCms(Cms):
    """Eq. 70/73: y = x, then y <- y + f_l(norm_l(y)) from the fastest level to the slowest. [T, B, D] -> [T, B, D].

    The paper leaves norms and residuals out; with pre-norm residuals a level whose output is zero is the identity.
    Nested levels (Eq. 72) are one link of the chain.
    """

    def sublayers(self) -> list[Sublayer]:
        """norm and f of every level, each with a residual of its own."""
        fast = [Sublayer(level.norm, level.mlp, mixes=True, start=level.mlp.start) for level in self.fast()]
        slow = [level.parts() for level in self.levels]  # type: ignore[operator]
        return [*fast, *(Sublayer(norm, stateless(body)) for norm, body in slow)]


@dataclass(frozen=True)
class LevelStates(State):
    """Of every level in context."""

    levels: tuple[State | None, ...]

    def reset(self, rows: Tensor, initial: Self) -> Self:
        pairs = zip(self.levels, initial.levels, strict=True)
        return type(self)(tuple(None if own is None or new is None else own.reset(rows, new) for own, new in pairs))


class IndependentCms(Cms):
    """Eq. 74: y = x + sum_l w_l f_l(norm_l(x)) with learned scalars w_l that start at 1. [T, B, D] -> [T, B, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        count = len(self.in_context) + len(self.levels)
        self.aggregate = new_parameter(count, init=constant(1.0), used="trunk", update="elementwise")

    def sublayers(self) -> list[Sublayer]:
        """One sublayer: the weighted sum. Each level has its norm inside."""
        if not self.in_context:
            return [Sublayer(nn.Identity(), stateless(lambda x: self._sum(x, [])))]
        return [Sublayer(nn.Identity(), self._mixed, mixes=True, start=self._start)]

    def _start(self, batch: int) -> LevelStates:
        return LevelStates(tuple(level.mlp.start(batch) for level in self.fast()))

    def _mixed(self, x: Tensor, state: State | None, documents: Documents | None) -> tuple[Tensor, State]:
        assert state is None or isinstance(state, LevelStates)
        before = (None,) * len(self.in_context) if state is None else state.levels
        found = [level.mlp(level.norm(x), own, documents) for level, own in zip(self.fast(), before, strict=True)]
        return self._sum(x, [y for y, _ in found]), LevelStates(tuple(after for _, after in found))

    def _sum(self, x: Tensor, fast: list[Tensor]) -> Tensor:
        return torch.stack([*fast, *(level(x) for level in self.levels)], -1) @ self.aggregate


@contextmanager
def without_level(modules: Iterable[nn.Module], number: int) -> Iterator[None]:
    """Inside the block, CMS level `number` of every block in these modules adds nothing: what is it worth?

    Of the levels on the optimizer's clock. All ranks of a layout do it together: a silent level takes part in no
    collective.
    """
    chains = [part for module in modules for part in module.modules() if isinstance(part, Cms)]
    levels = [chain.levels[number] for chain in chains]
    for level in levels:
        level.silent = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for level in levels:
            level.silent = False  # type: ignore[assignment]


def build_cms(config: ModelConfig) -> Cms:
    """The MLP part of a block; a Transformer++ has a chain of one level."""
    return IndependentCms(config) if config.cms.chain == "independent" else SequentialCms(config)
