"""Probes of recall: associative recall, selective copying, palindromes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hope.evaluate.probes.base import IGNORE, Example, generator_of


@dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall (Arora et al., Zoology, 2023, Section 4; HazyResearch/zoology,
    `multiquery_ar.py`).

    `pairs` keys with a value each, then each key once more, at gaps that follow a power law; there the value is asked.
    Keys are 1 to vocab_size / 2 - 1, values from there on; all other places have random tokens.
    """

    length: int = 64
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.length % 2 or 4 * self.pairs > self.length or self.pairs >= self.vocab_size // 2:
            raise ValueError(f"{self.pairs} pairs in {self.length} tokens of {self.vocab_size}; need an even length of"
                             f" at least {4 * self.pairs}, and a vocabulary above {2 * self.pairs}")  # fmt: skip

    def example(self, seed: int, index: int) -> Example:
        """See `Probe`."""
        rng = generator_of(seed, index)
        middle, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + rng.choice(middle - 1, self.pairs, replace=False)
        values = middle + rng.choice(self.vocab_size - middle, self.pairs, replace=False)
        space = (self.length - context) // 2
        weights = np.arange(1, space + 1) ** (self.power - 1)
        gaps = rng.choice(space, self.pairs, replace=False, p=weights / weights.sum())
        tokens = rng.integers(0, self.vocab_size, self.length)
        targets = np.full(self.length, IGNORE)
        tokens[:context:2], tokens[1:context:2] = keys, values
        tokens[context + 2 * gaps] = keys
        targets[context + 2 * gaps] = values
        return Example(tokens, targets)


@dataclass(frozen=True)
class SelectiveCopy:
    """Selective copying (Gu and Dao, Mamba, 2023, Section 4.1.1; MAD: vocabulary 16, length 256, 16 tokens to copy).

    `copied` tokens stand at random places among noise (token 0); at the end `copied` marks (token 1) ask for them in
    order.
    """

    length: int = 256
    copied: int = 16
    vocab_size: int = 16

    def example(self, seed: int, index: int) -> Example:
        """See `Probe`."""
        rng = generator_of(seed, index)
        data = rng.integers(2, self.vocab_size, self.copied)
        tokens, targets = np.zeros(self.length, np.int64), np.full(self.length, IGNORE)
        tokens[np.sort(rng.choice(self.length - self.copied, self.copied, replace=False))] = data
        tokens[-self.copied :], targets[-self.copied :] = 1, data
        return Example(tokens, targets)


@dataclass(frozen=True)
class Palindrome:
    """A random sequence, a mark (token 0), and the sequence backwards, which is asked (Kimi Linear, 2025, Section 5.1).

    length: 2 x the sequence's; what the model says is also what it reads next.
    """

    length: int = 256
    vocab_size: int = 64

    def example(self, seed: int, index: int) -> Example:
        """See `Probe`."""
        half = self.length // 2
        data = generator_of(seed, index).integers(1, self.vocab_size, half)
        tokens = np.concatenate([data, [0], data[:0:-1]])
        return Example(tokens, np.concatenate([np.full(half, IGNORE), data[::-1]]))
