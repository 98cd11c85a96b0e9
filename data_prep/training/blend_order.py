"""Which source each sample of a blend comes from: a pure function of (weights, position).

Item j of a source with share p would ideally stand at position (j + 1/2) / p; the blend is all items sorted by that
(the divisor method of Webster and Sainte-Lague). Nothing depends on how long the run is, and the counts at any
position follow from rounding, so a resumed run starts there at once.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

_FORWARD = 64  # positions that are cheaper to walk than to jump to


class BlendOrder:
    """Sample number -> (source, number within the source).

    After k samples source i has been taken between k p_i - d and k p_i + d times, d = 1/2 + p_i sources / 2, and
    exactly its share after every `period` samples. Exact: whole numbers throughout.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights are positive and need not sum to 1.

        Raises ValueError if there are none or one is not a positive finite number.
        """
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"blend weights {list(weights)}: need positive numbers")
        # repr is the shortest decimal that reads back as the same float: 0.3 is 3/10, not 5404319552844595/2^54
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = math.gcd(*whole)
        self._whole = [weight // common for weight in whole]
        multiple = math.lcm(*self._whole)
        self._spacing = [multiple // weight for weight in self._whole]
        self._cursor: tuple[int, tuple[int, ...]] = (0, (0,) * len(whole))
        self.period = sum(self._whole)

    @property
    def shares(self) -> list[float]:
        """The weights scaled to sum 1."""
        return [weight / self.period for weight in self._whole]

    @property
    def words(self) -> list[str]:
        """Of every source what decides where its samples stand, as checkpoints record it."""
        return [f"{share:.12g}" for share in self.shares]

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples come from each source."""
        start, counts = self._near(position)
        for _ in range(position - start):
            counts[self._next(counts)] += 1
        return counts

    def locate(self, position: int) -> tuple[int, int]:
        """(source, number within the source) of the sample at `position`."""
        counts = self.counts(position)
        # One assignment of one tuple: a background thread may ask at the same time.
        self._cursor = (position, tuple(counts))
        source = self._next(counts)
        return source, counts[source]

    def _near(self, position: int) -> tuple[int, list[int]]:
        """A position at most `position`, and the counts there: the last one used, or one from rounding."""
        if position < 0:
            raise IndexError(f"position {position} is before the first sample")
        start, counts = self._cursor
        if start <= position <= start + _FORWARD:
            return start, list(counts)
        # All items up to ideal position x are round(x p_i) of each source, together x +- sources / 2.
        x = max(0, position - len(counts) // 2 - 1)
        rounded = [(2 * x * weight + self.period) // (2 * self.period) for weight in self._whole]
        return sum(rounded), rounded

    def _next(self, counts: Sequence[int]) -> int:
        """The source whose next item has the earliest ideal position; of equal ones the first."""
        spacing = self._spacing
        return min(range(len(spacing)), key=lambda source: (2 * counts[source] + 1) * spacing[source])
