"""Probes of state tracking: word problems of groups, with parity as the smallest, and modular arithmetic."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hope.evaluate.probes.base import IGNORE, Example, generator_of

Group = Literal["Z2", "S3", "S4", "S5"]


@functools.cache
def product_table(group: Group) -> np.ndarray:
    """[n, n]: the number of element a times element b. Z2: addition; Sn: permutations in lexicographic order, and
    (a b)(i) = a(b(i))."""
    if group == "Z2":
        return np.array([[0, 1], [1, 0]])
    elements = list(itertools.permutations(range(int(group[1]))))
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


@dataclass(frozen=True)
class Word:
    """The word problem of a group (Liu et al., 2023; Merrill et al., 2024; jopetty/word-problem).

    Uniform elements; asked at every place is the product of all so far, x_1 ... x_t. Z2 is parity: is the number of
    ones so far odd?
    """

    length: int = 128
    group: Group = "S3"

    @property
    def vocab_size(self) -> int:
        return len(product_table(self.group))

    def example(self, seed: int, index: int) -> Example:
        """See `Probe`."""
        table = product_table(self.group)
        tokens = generator_of(seed, index).integers(0, len(table), self.length)
        targets = np.array(list(itertools.accumulate(tokens.tolist(), lambda a, b: int(table[a, b]))), np.int64)
        return Example(tokens, targets)


@dataclass(frozen=True)
class ModularArithmetic:
    """Modular arithmetic without brackets (Deletang et al., 2023): an expression of numbers below `modulus` with +, -
    and *, which binds more, then "=", where its value modulo `modulus` is asked.

    Tokens: the numbers, then + - * =. length: even, "=" included.
    """

    length: int = 40
    modulus: int = 5

    @property
    def vocab_size(self) -> int:
        return self.modulus + 4

    def example(self, seed: int, index: int) -> Example:
        """See `Probe`."""
        rng, terms = generator_of(seed, index), self.length // 2
        numbers, signs = rng.integers(0, self.modulus, terms), rng.integers(0, 3, terms - 1)
        tokens, targets = np.zeros(2 * terms, np.int64), np.full(2 * terms, IGNORE)
        tokens[::2], tokens[1:-1:2], tokens[-1] = numbers, self.modulus + signs, self.modulus + 3
        total, factor = 0, int(numbers[0])
        for sign, number in zip(signs.tolist(), numbers[1:].tolist(), strict=True):
            if sign == 2:
                factor = factor * number % self.modulus
            else:
                total, factor = total + factor, number if sign == 0 else -number
        targets[-1] = (total + factor) % self.modulus
        return Example(tokens, targets)
