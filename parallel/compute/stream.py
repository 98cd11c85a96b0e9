"""States that go on from step to step (`data.documents: stream`): row b of a micro-batch follows row b of the same
micro-batch of the step before. Between steps they are detached: gradients reach back to the start of the step.

A step reads the states that were kept and writes new ones beside them, which `keep` puts in their place. So a step that
is skipped leaves the states as they were. A stage's n-th forward pass of a step is that of micro-batch n, in every
schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hope.model import Model, States

V = TypeVar("V")


class CarriedStates:
    """The states of every micro-batch on a rank, for each of its model chunks.

    Attributes:
        kept: by chunk, then by micro-batch; None before the first step that was kept.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = list(models)
        self.kept: list[list[States]] | None = None
        self._after: list[list[States]] = [[] for _ in models]

    def begin(self) -> None:
        """A step's passes come next."""
        self._after = [[] for _ in self.models]

    def trunk(self, model: Model, inputs: Tensor, starts: Tensor | None) -> Tensor:
        """`Model.trunk` of the next micro-batch of this chunk, from the state that it has come to.

        Raises:
            ValueError: the step has more micro-batches than the one before.
        """
        chunk = next(number for number, own in enumerate(self.models) if own is model)
        done = self._after[chunk]
        if self.kept is not None and len(done) == len(self.kept[chunk]):
            raise ValueError(f"a step of more than the {len(done)} micro-batches whose states are carried")
        before = None if self.kept is None else self.kept[chunk][len(done)]
        outputs, after = model.trunk(inputs, before, starts)
        done.append(detached(after))
        return outputs

    def keep(self, wanted: bool) -> None:
        """The step is over: its states are those that the next one begins with or, unless `wanted`, are dropped."""
        if wanted:
            self.kept = self._after
        self.begin()


def detached(states: States) -> States:
    """The same values with no gradient to the past, in memory of their own: a view would keep a whole pass alive."""
    return {block: rewritten(state, _copied) for block, state in states.items()}


def _copied(leaf: Tensor | int) -> Tensor | int:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def rewritten(value: V, change: Callable[[Tensor | int], Tensor | int]) -> V:
    """`value`, of tuples and dataclasses, with every tensor and whole number in it replaced by change(it), in order.

    A part that is there twice is changed once and there twice: banks of memories that share their states go on to.
    """
    done: dict[int, Any] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor) or (isinstance(part, int) and not isinstance(part, bool)):
            return change(part)
        if not isinstance(part, tuple) and (not dataclasses.is_dataclass(part) or isinstance(part, type)):
            return part
        if id(part) not in done:
            done[id(part)] = again(part)
        return done[id(part)]

    def again(part: Any) -> Any:
        if isinstance(part, tuple):
            inside = [walk(item) for item in part]
            return type(part)(*inside) if hasattr(part, "_fields") else tuple(inside)
        changed = {item.name: walk(getattr(part, item.name)) for item in dataclasses.fields(part)}
        return dataclasses.replace(part, **changed)

    found: V = walk(value)
    return found


def leaves(value: Any) -> Iterator[Tensor | int]:
    """What `rewritten` hands to `change`, in order."""
    found: list[Tensor | int] = []
    rewritten(value, lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return iter(found)


@torch.no_grad()
def pattern(model: Model, seq_len: int, rows: int, steps: int, tensor: int) -> States:
    """States of `rows` sequences as they are built after so many steps; their values and sizes are of no account.

    After the first step a state may have other parts than after later ones. tensor: ranks over which sequence
    parallelism divides what arrives here; 1 without.
    """
    like = next(model.parameters())
    if model.has_embedding:
        inputs = torch.zeros(seq_len, rows, dtype=torch.long, device=like.device)
    else:
        inputs = like.new_zeros(seq_len // tensor, rows, model.config.width)
    state: States | None = None
    for _ in range(min(max(steps, 1), 2)):
        _, state = model.trunk(inputs, state)
    assert state is not None
    return state
