"""A probe: examples that are a pure function of (seed, index), made from a published definition."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

IGNORE = -1
"""A target that does not count."""


class Example(NamedTuple):
    """tokens: what the model reads, int64 [T]; targets: what it should say at each place, int64 [T], or IGNORE."""

    tokens: np.ndarray
    targets: np.ndarray


class Probe(Protocol):
    """One size of one probe."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this; sizes of one probe share it."""

    @property
    def length(self) -> int:
        """Tokens of an example."""

    def example(self, seed: int, index: int) -> Example:
        """The example of this number: the same on every machine, whichever were made before."""


def generator_of(seed: int, index: int) -> np.random.Generator:
    """Random numbers of one example."""
    return np.random.default_rng([seed, index])
