"""What a model that learns sources one after another keeps of the earlier ones, in nats of held-out loss.

R[i, j] is the loss on source j's held-out set after phase i, which trains on source i; R[0, j] is that before the first
phase. Lopez-Paz and Ranzato (2017, "Gradient Episodic Memory", Section 2) define backward and forward transfer for
accuracies; losses have the other sign, so that positive is better here as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

PREFIX = "continual.loss."
"""Of the metrics key of a source's held-out loss."""
MEASURES = ("forgetting", "backward_transfer", "forward_transfer", "retained")
Row = Mapping[str, float]
"""Held-out loss in nats by source, of one time."""


class Phase(Protocol):
    """A part of the run that reads one source; `data_prep.training.phase_order` has them."""

    @property
    def name(self) -> str:
        """Of its source."""

    @property
    def last(self) -> int:
        """Its last step, counted from 1."""


def forgetting(rows: Sequence[Row | None], now: Row, source: str) -> float:
    """now[j] - min_i R[i, j], over the rows that there are and now itself: 0 or more."""
    return now[source] - min(now[source], *(row[source] for row in rows if row))


def backward_transfer(own: Row, now: Row, source: str) -> float:
    """R[j, j] - now[j]: what later phases have made of it since its own one ended; negative is forgetting."""
    return own[source] - now[source]


def forward_transfer(first: Row, before: Row, source: str) -> float:
    """R[0, j] - R[j - 1, j]: what the phases before its own one have given it."""
    return first[source] - before[source]


def retained(before: Row, own: Row, now: Row, source: str) -> float | None:
    """(R[j - 1, j] - now[j]) / (R[j - 1, j] - R[j, j]): the share of its own phase's improvement that is left.

    1: all of it, 0: none, negative: worse than before its phase. None if its phase improved nothing.
    """
    gained = before[source] - own[source]
    return (before[source] - now[source]) / gained if gained > 0 else None


def measures(names: Sequence[str], rows: Sequence[Row | None], now: Row, finished: int) -> dict[str, float]:
    """All of them by metrics key, `continual.MEASURE.SOURCE`, and `continual.MEASURE`, the mean over its sources.

    Args:
        names: the sources in the order of their phases.
        rows: R so far; None where it was not measured, and what needs that row is left out.
        now: the losses at this time.
        finished: phases that ended before this time: of these sources, what is kept is told.
    """
    found: dict[str, dict[str, float]] = {}
    put = lambda measure, name, value: found.setdefault(measure, {}).update({name: value})
    at = lambda number: rows[number] if number < len(rows) else None
    for number, name in enumerate(names, 1):
        first, before, own = at(0), at(number - 1), at(number)
        if number > 1 and first and before:
            put("forward_transfer", name, forward_transfer(first, before, name))
        if number > finished:
            continue
        put("forgetting", name, forgetting(rows, now, name))
        if own:
            put("backward_transfer", name, backward_transfer(own, now, name))
        if own and before and (share := retained(before, own, now, name)) is not None:
            put("retained", name, share)
    told: dict[str, float] = {}
    for measure, values in found.items():
        told[f"continual.{measure}"] = sum(values.values()) / len(values)
        told |= {f"continual.{measure}.{name}": value for name, value in values.items()}
    return told


class Course:
    """R of a run while it grows; of a run without phases, nothing."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        """`phases`: in order, none of a run that blends."""
        self._names = [phase.name for phase in phases]
        self._borders = [0, *(phase.last for phase in phases)] if phases else []
        self._rows: list[Row | None] = [None] * len(self._borders)

    @property
    def borders(self) -> list[int]:
        """Steps after which R has a row, 0 among them."""
        return list(self._borders)

    def lacks(self, step: int) -> bool:
        """Whether `step` is a border after which nothing was measured: a run that is told to stop has no time."""
        return step in self._borders and self._rows[self._borders.index(step)] is None

    def note(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an evaluation after `step`: those given, losses, measures, and at a border its `phase`, a number.

        `metrics` has `heldout_loss.SOURCE` of every source; without them nothing is noted.
        """
        keys = [f"heldout_loss.{name}" for name in self._names]
        if not self._borders or not all(key in metrics for key in keys):
            return dict(metrics)
        now = {name: metrics[key] for name, key in zip(self._names, keys, strict=True)}
        phase = {}
        if step in self._borders:
            number = self._borders.index(step)
            self._rows[number], phase = now, {"phase": number}
        begun = self._rows[: sum(border <= step for border in self._borders)]
        finished = sum(border < step for border in self._borders[1:])
        losses = {f"{PREFIX}{name}": loss for name, loss in now.items()}
        return {**metrics, **phase, **losses, **measures(self._names, begun, now, finished)}

    def ended(self, step: int) -> dict[str, Any]:
        """What to say of the phase that ended with `step`: number, source, and losses; nothing if none did."""
        if step not in self._borders[1:]:
            return {}
        number = self._borders.index(step)
        losses = {f"{PREFIX}{name}": loss for name, loss in (self._rows[number] or {}).items()}
        return {"phase": number, "source": self._names[number - 1], **losses}

    def state(self) -> list[dict[str, float] | None]:
        """R so far, plain JSON."""
        return [None if row is None else dict(row) for row in self._rows]

    def restore(self, state: Sequence[Row | None]) -> None:
        """Go on from a checkpoint's `state`."""
        self._rows = [*state[: len(self._borders)], *[None] * (len(self._borders) - len(state))]
