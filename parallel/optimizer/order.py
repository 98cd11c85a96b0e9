"""The order of calls in a step, checked: a gradient that was reduced twice, or not at all, looks like any other."""

from __future__ import annotations

from enum import IntEnum


class StepStage(IntEnum):
    """How far a step has come."""

    ACCUMULATING = 0
    PREPARED = 1
    REDUCED = 2


_IS = {
    StepStage.ACCUMULATING: "this step is not prepared",
    StepStage.PREPARED: "this step is prepared, and has no reduced gradients",
    StepStage.REDUCED: "this step is reduced",
}
_THEN = {
    StepStage.ACCUMULATING: "call step() or discard() first",
    StepStage.PREPARED: "call prepare() once, after all micro-batches and before reduce()",
    StepStage.REDUCED: "call reduce() first",
}


class StepOrder:
    """Where a step of a sharded optimizer stands."""

    def __init__(self) -> None:
        self._stage = StepStage.ACCUMULATING

    def require(self, stage: StepStage, call: str) -> None:
        """`call` is possible at this stage only.

        Raises:
            RuntimeError: the step is at another stage. The message says what to call.
        """
        if self._stage is not stage:
            raise RuntimeError(f"{call}() out of order: {_IS[self._stage]}; {_THEN[stage]}")

    def reach(self, stage: StepStage) -> None:
        """The step has come to this stage."""
        self._stage = stage
