"""Which token comes next.

The draw for a place in a sequence is a hash of (seed, copy, place). It depends neither on the device, nor on the
layout, nor on what else is in the batch, and a sequence that goes on later draws what it would have drawn.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hope.generate.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from the model's probabilities: temperature first, then top_k, then top_p.

    temperature: 0 takes the most probable token (greedy); 1 the model's own probabilities.
    top_k: only the k most probable tokens. None: all.
    top_p: only the fewest tokens that together have at least this probability (Holtzman et al., 2020). 1: all.
    seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """Everything that cannot work, by the name of the option."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield f"--temperature {self.temperature} is no temperature; 0 is greedy, 1 the model's own probabilities"
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k {self.top_k} leaves no token; give 1 or more, or leave it out for all"
        if not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p} is not a share; give a number above 0 and up to 1, which is all"


def uniform(seed: int, copy: int, place: int) -> float:
    """A number in [0, 1) with 53 random bits.

    Args:
        copy: 0; of several sequences with one prompt, how many of them come before.
        place: tokens of the sequence before the one that is drawn.
    """
    digest = hashlib.sha256(f"{seed}/{copy}/{place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def choose(scores_BV: Tensor, sampling: Sampling, draws: Sequence[float]) -> list[int]:
    """A token for every row of `scores_BV` (logits, any device and dtype), with one draw in [0, 1) each.

    Computed in float64 on the CPU. Of tokens that are equally probable the one with the lowest id comes first.

    Raises:
        GenerationError: a score is not a number, or infinite.
    """
    scores = scores_BV.detach().to("cpu", torch.float64)
    if not bool(scores.isfinite().all()):
        raise GenerationError("the model's scores are not finite: its weights have diverged, or --dtype is too narrow")
    if sampling.temperature == 0:
        return [int(row.argmax()) for row in scores]
    below = scores - scores.amax(-1, keepdim=True)  # before the division: a tiny temperature makes it -inf, not inf
    weights = allowed((below / sampling.temperature).softmax(-1), sampling)
    ends = weights.cumsum(-1)
    wanted = torch.tensor(draws, dtype=torch.float64).unsqueeze(-1) * ends[:, -1:]
    # the first end above: a token that weighs something, since a draw below 1 times the whole stays below the whole
    found = torch.searchsorted(ends, wanted, right=True).squeeze(-1)
    return [int(token) for token in found]


def allowed(probabilities_BV: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities, zero for tokens that top_k and top_p leave out; not normalised again."""
    if sampling.top_k is None and sampling.top_p == 1:
        return probabilities_BV
    ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities_BV).scatter(-1, order, ordered)
