"""What a block is a list of: residual sublayers, each of which may carry a state from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hope.documents import Documents
from hope.mixers import State

Body = Callable[[Tensor, State | None, Documents | None], tuple[Tensor, State | None]]


class Sublayer(NamedTuple):
    """x <- x + body(norm(x)). The modules belong to the block, which names them.

    body: (x [T, B, D], state, documents) -> (y [T, B, D], state).
    mixes: whether tokens meet in it. start: the state of that many sequences before their first token.
    """

    norm: Callable[[Tensor], Tensor]
    body: Body
    mixes: bool = False
    start: Callable[[int], State | None] = lambda batch: None

    def __call__(self, x: Tensor, state: State | None, documents: Documents | None) -> tuple[Tensor, State | None]:
        return self.body(self.norm(x), state, documents)


def stateless(function: Callable[[Tensor], Tensor]) -> Body:
    """The body of a sublayer that treats every token by itself."""
    return lambda x, state, documents: (function(x), None)
