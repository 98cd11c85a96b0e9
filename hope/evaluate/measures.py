"""A number and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A value and its standard error, None where one observation gives none."""

    value: float
    error: float | None

    def times(self, factor: float) -> Measure:
        return Measure(self.value * factor, None if self.error is None else self.error * abs(factor))

    def exp(self) -> Measure:
        """The exponential, its error by the delta method; infinite where a float cannot hold it."""
        value = math.exp(self.value) if self.value < 709 else math.inf
        return Measure(value, None if self.error is None else self.error * value)

    def json(self) -> dict[str, Any]:
        """{"value", "error"}."""
        return {"value": self.value, "error": self.error}


def mean(values: Sequence[float]) -> Measure:
    """Mean and its standard error, s / sqrt(n) with the unbiased s."""
    return ratio(values, [1] * len(values))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Measure:
    """sum(sums) / sum(counts) over independent clusters (windows, documents), with the standard error of a ratio.

    The error is sqrt(n / (n - 1) sum (x_i - r m_i)^2) / sum m_i (Cochran, Sampling Techniques, 1977, Eq. 2.39, without
    the correction for finite populations). Tokens of a window are not independent, windows nearly are.

    Raises:
        ValueError: there is nothing to average.
    """
    total, n = sum(counts), len(sums)
    if not total:
        raise ValueError("no observations")
    value = math.fsum(sums) / total
    if n < 2:
        return Measure(value, None)
    squares = math.fsum((x - value * m) ** 2 for x, m in zip(sums, counts, strict=True))
    return Measure(value, math.sqrt(n / (n - 1) * squares) / total)
