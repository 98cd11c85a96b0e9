"""The section of a CMS level that is rewritten inside the sequence: an entry of `model.cms.in_context`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hope.sections import Problem

USUAL_RATE, USUAL_CHUNK = 0.025, 64
"""The default rate, and the chunk up to which it is that. Four times as much diverged at chunks of 16 (docs/LOG.md)."""


@dataclass(kw_only=True)
class InContextConfig:
    """A fast level: one MLP per head whose weights a sequence rewrites after every chunk of its tokens (Eq. 71)."""

    chunk: int = 64
    """Tokens between two rewritings; the gradients of a chunk are all taken at the weights of its start."""
    heads: int | None = None
    """Number of MLPs side by side; null: model.heads."""
    head_dim: int | None = None
    """Input and output width of each; null: model.width over heads."""
    hidden: int | None = None
    """Hidden width of each; null: head_dim. A sequence keeps 2 x heads x head_dim x hidden fp32 numbers per layer."""
    objective: Literal["next", "target"] = "next"
    """What a level learns in the sequence, by 1/2 |M(k) - target|^2. next: from a token's input the next token's;
    target: from its input what M makes of a learned projection of it, a target of its own making (Eq. 84)."""
    read: Literal["boundary", "causal"] = "boundary"
    """boundary: all tokens of a chunk see the weights of its start (Eq. 71); causal: also the chunk's own writes up to
    the token."""
    rate: float | None = None
    """Bound of the inner rate for inputs of norm 1; null: 0.025, for chunks of more than 64 tokens 1.6 / chunk.
    0: nothing is ever written, and the level is an
    ordinary MLP."""
    forget_bias: float | None = -6.0
    """Initial bias of the share (a sigmoid) by which a token lets the weights return to their start; null: they never
    do."""

    def rate_bound(self) -> float:
        """The largest inner rate for inputs of norm 1."""
        return self._usual() if self.rate is None else self.rate

    def _usual(self) -> float:
        return min(USUAL_RATE, USUAL_RATE * USUAL_CHUNK / self.chunk)

    def hazards(self) -> list[str]:
        """Settings that were seen to diverge, as sentences for a warning."""
        if self.rate_bound() < 4 * self._usual():
            return []
        return [f"rate {self.rate:g} is four times {self._usual():g} or more, at which training diverged"]

    def problems(self, path: str, width: int, model_heads: int) -> Iterator[Problem]:
        """What cannot work in a model of this width and these heads."""
        for key in ("chunk", "heads", "head_dim", "hidden"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield Problem(f"{path}.{key}", f"{value} is less than 1", "64" if key == "chunk" else "null")
        if self.rate is not None and not 0 <= self.rate < math.inf:
            yield Problem(f"{path}.rate", f"{self.rate} is not a rate", f"{USUAL_RATE:g}")
        if self.forget_bias is not None and not math.isfinite(self.forget_bias):
            yield Problem(f"{path}.forget_bias", f"{self.forget_bias} is not finite", "-6.0, or null for none")
        heads = model_heads if self.heads is None else self.heads
        if self.head_dim is None and heads >= 1 and width % heads:
            near = sorted((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))[:3]
            what = f"model.width {width} is not a multiple of heads {heads}"
            yield Problem(f"{path}.heads", what, f"heads {', '.join(map(str, sorted(near)))}; or give head_dim")


@dataclass(frozen=True)
class Sizes:
    """What one level has: `heads` MLPs head_dim -> hidden -> head_dim."""

    heads: int
    head_dim: int
    hidden: int

    @staticmethod
    def of(level: InContextConfig, width: int, model_heads: int) -> Sizes:
        """Of a level in a model of this width and these heads."""
        heads = model_heads if level.heads is None else level.heads
        head_dim = width // heads if level.head_dim is None else level.head_dim
        return Sizes(heads, head_dim, head_dim if level.hidden is None else level.hidden)

    @property
    def state(self) -> int:
        """Numbers that a sequence rewrites."""
        return 2 * self.heads * self.head_dim * self.hidden


_SHARED = ("heads", "head_dim", "hidden", "objective", "read")


def order_problems(levels: Sequence[InContextConfig], nested: bool, path: str) -> Iterator[Problem]:
    """What is wrong with the levels together. path: of the list. nested: one level starts from the slower one's
    weights, so that they are alike but for their clocks and rates."""
    chunks = [level.chunk for level in levels]
    if chunks != sorted(chunks):
        yield Problem(path, f"chunks {chunks} are not fastest first", f"chunks {sorted(chunks)}")
    if not nested:
        return
    variant = f"{path.rpartition('.')[0]}.variant"
    if len(levels) < 2:
        what = f"nested is about levels within one another, and {path} has {len(levels)}"
        yield Problem(variant, what, "sequential; or two levels, such as [{chunk: 16}, {chunk: 64}]")
    for number, (fast, slow) in enumerate(itertools.pairwise(levels)):
        if min(fast.chunk, slow.chunk) < 1:
            continue  # told of the level
        if slow.chunk % fast.chunk or slow.chunk == fast.chunk:
            what = f"{slow.chunk} is not two or more chunks of {fast.chunk}, the faster level's"
            near = sorted({max(2, slow.chunk // fast.chunk) * fast.chunk, (slow.chunk // fast.chunk + 1) * fast.chunk})
            yield Problem(f"{path}[{number + 1}].chunk", what, " or ".join(map(str, near)))
        for key in _SHARED:
            one, other = getattr(fast, key), getattr(slow, key)
            if one != other:
                what = f"{other}, and the faster level has {one}: nested levels are one MLP at several clocks"
                yield Problem(f"{path}[{number + 1}].{key}", what, f"{'null' if one is None else one} in both")
