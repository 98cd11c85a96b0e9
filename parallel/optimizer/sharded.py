"""What the training loop, the referee and a checkpoint ask of an optimizer over ranks.

`zero.ZeroOptimizer` has it for element-wise optimizers, `matrix_zero.MatrixZeroOptimizer` for Muon and M3. Both derive
from the protocol, so that mypy compares them with it, and its docstrings are theirs.

A step is, in this order: micro-batches add to the gradients, `prepare`, whatever changes `accumulated` gradients,
`reduce`, a look at `grad_norms`, and either `step` or `discard`. `StepOrder` refuses any other order: a gradient that
was reduced twice, or not at all, looks like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor, nn

from hope.optim.clocks import Watched
from parallel.optimizer.checkpoint_views import ShardedState
from parallel.start.groups import Ranks


class ShardedOptimizer(ShardedState, Protocol):
    """An optimizer whose states and fp32 master weights are divided over ranks.

    Attributes:
        ranks: this process's place.
        group_names: names of the parameter groups of the whole model, in the same order on every rank.
        reduced_bytes: bytes of gradients that the last `reduce` gave to collectives over the data-parallel ranks.
    """

    ranks: Ranks
    group_names: list[str]
    reduced_bytes: int

    def prepare(self) -> None:
        """All micro-batches of this step are done: add what due levels have kept on this rank. Once per step.

        Raises:
            RuntimeError: this step was already prepared.
        """

    def accumulated(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient accumulated over micro-batches and not yet reduced, to be changed in place before `reduce`.

        fp32, of this parameter's shape. Zeros if the backward pass did not reach it, so that ranks agree on which
        collectives follow. None for a parameter without partial gradients: one that is not optimized, that this step
        does not communicate, or a matrix that one rank owns.

        Raises:
            RuntimeError: this step is not prepared, or already reduced.
        """

    def reduce(self) -> None:
        """Average the gradients over the data-parallel ranks, those of a due level over its period. Collective.

        Raises:
            RuntimeError: this step is not prepared, or already reduced.
        """

    def grad_norms(self) -> dict[str, float]:
        """L2 norm of the gradient that the coming step will use, of the whole model per parameter group. Collective.

        The same on every rank. Each element counts once over data, tensor and pipeline ranks, and padding does not. A
        level that is not due has norm 0, or NaN if what it has accumulated in this step is not finite.

        Raises:
            RuntimeError: this step is not reduced.
        """

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter (in the model's order) with an inf or NaN in its gradient, or None. Collective.

        The same on every rank. It reads every gradient and waits for the device: call it only when a norm is not
        finite.

        Raises:
            RuntimeError: this step is not reduced.
        """

    def step(self, clip_scale: float = 1.0) -> None:
        """Update the masters from the gradients times `clip_scale`, then the parameters of all ranks. Collective.

        Raises:
            RuntimeError: this step is not reduced.
        """

    def discard(self) -> None:
        """Forget this step's gradients. Parameters, optimizer states and clocks stay as they are. At any time."""

    def watch(self, which: Watched) -> None:
        """Whether the next step collects what `statistics` tells, of all groups that move or as a function of the group
        says, the same on every rank. That costs some passes over their weights."""

    def statistics(self) -> dict[str, float]:
        """What its last due step did per group of the whole model, as `statistics.group_statistics` says. Collective.

        The same on every rank. Only the clock of a group whose step was not watched.
        """

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        """Set every group's learning rate: one number times the group's `rate`, or a function of the group."""

    def gradient_pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's reduced gradients. Ranks hold each once.

        Raises:
            RuntimeError: this step is not reduced.
        """

    def master_pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, offset in the flattened shard, values) of this rank's master weights. Collective over tensor ranks."""

    def close(self) -> None:
        """Remove every hook from the model."""


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
