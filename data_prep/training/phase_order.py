"""Sources one after another (`train.mode: continual`): which source each sample of a run comes from."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data_prep.config import DataConfig
from data_prep.training.blend_order import BlendOrder


class SampleOrder(Protocol):
    """Sample number of the run -> (source, number within the source)."""

    @property
    def shares(self) -> list[float]:
        """Of every source in the samples of the run, sum 1."""

    @property
    def words(self) -> list[str]:
        """Of every source what decides where its samples stand; a resumed run must agree."""

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples come from each source."""

    def locate(self, position: int) -> tuple[int, int]:
        """(source, number within the source) of the sample at `position`."""


class Lengths(Protocol):
    """Of a run; `hope.train.config.TrainConfig` has them."""

    @property
    def mode(self) -> str:
        """blend or continual."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps."""

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all ranks."""


class PhaseOrder:
    """Source i gives `lengths[i]` samples after those of the sources before it; the last one goes on without an end.

    Where a source begins does not depend on how long the last phase is, so that it can be made longer.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """Raises ValueError if there are none, or one is below 1."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"phases of {list(lengths)} samples: need one or more of each")
        self._lengths = list(lengths)
        self._starts = [0, *itertools.accumulate(lengths[:-1])]

    @property
    def shares(self) -> list[float]:
        return [length / sum(self._lengths) for length in self._lengths]

    @property
    def words(self) -> list[str]:
        return [f"from sample {start}" for start in self._starts]

    def counts(self, position: int) -> list[int]:
        ends = [*self._starts[1:], max(position, self._starts[-1])]
        return [max(0, min(position, end) - start) for start, end in zip(self._starts, ends, strict=True)]

    def locate(self, position: int) -> tuple[int, int]:
        """Raises IndexError for a position below 0."""
        if position < 0:
            raise IndexError(f"position {position} is before the first sample")
        source = bisect_right(self._starts, position) - 1
        return source, position - self._starts[source]


@dataclass(frozen=True)
class Phase:
    """The steps, counted from 1, that read one source."""

    name: str
    first: int
    last: int


def phases_of(data: DataConfig, lengths: Lengths) -> list[Phase]:
    """The phases of a continual run in order, [] of a blend. A source's weight is its share of the steps.

    Raises:
        ValueError: a share is no whole number of steps.
    """
    if lengths.mode != "continual":
        return []
    sources = [source for _, source in data.entries()]
    weights = [source.weight for source in sources]
    order, steps = BlendOrder(weights), lengths.total_steps
    if steps % order.period:
        raise ValueError(f"weights {weights} do not divide {steps} steps: give a multiple of {order.period}")
    ends = list(itertools.accumulate(order.counts(steps)))  # exactly the shares after whole periods
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [Phase(source.name, *limits) for source, limits in zip(sources, zip(starts, ends, strict=True), strict=True)]


def order_of(data: DataConfig, lengths: Lengths) -> SampleOrder:
    """The order in which a run reads its sources: blended, or one after another."""
    if phases := phases_of(data, lengths):
        return PhaseOrder([(phase.last - phase.first + 1) * lengths.global_batch for phase in phases])
    return BlendOrder([source.weight for _, source in data.entries()])
