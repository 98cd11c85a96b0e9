"""What scores token ids: all that the rest of this package needs to know of a model.

Shapes: T time, B batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.model import Model

PIECE = 1024  # logits whose log-probabilities are taken at once: 128 MB in fp32 with a vocabulary of 32,000


@dataclass(frozen=True)
class Scores:
    """Of one call.

    Attributes:
        nats_TB: minus the log-probability of each target, at least fp32.
        best_TB: bool, whether the target is the most likely token (greedy decoding would take it).
        state: what the next call takes to go on.
    """

    nats_TB: Tensor
    best_TB: Tensor
    state: Any


class Scorer(Protocol):
    """Scores targets given inputs. A call with the state of the call before goes on from there."""

    def __call__(self, tokens_TB: Tensor, targets_TB: Tensor, state: Any, keep_state: bool) -> Scores:
        """tokens_TB, targets_TB: int64 [T, B] on the CPU; state: None to start every sequence anew; keep_state:
        whether the state is wanted."""


class ModelScorer:
    """A whole model on one device.

    Args:
        model: is moved to `device` and `dtype`.
        starts_after: the token after which every sequence starts anew, as in training with `data.documents: reset`;
            None: state is carried over it.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        starts_after: int | None = None,
    ) -> None:
        self.device, self.starts_after = torch.device(device), starts_after
        self.model = model.to(self.device, dtype).eval()
        self.vocab_size = model.config.vocab_size

    def __call__(self, tokens_TB: Tensor, targets_TB: Tensor, state: Any, keep_state: bool) -> Scores:
        """See `Scorer`. Raises ValueError for an id that the model has no row for."""
        with torch.no_grad():
            return self.scores(tokens_TB, targets_TB, state, keep_state)

    def scores(self, tokens_TB: Tensor, targets_TB: Tensor, state: Any, keep_state: bool) -> Scores:
        """The same, with a graph to the weights that require a gradient; the state is that of the model, and the last
        token [1, B]."""
        largest = int(torch.maximum(tokens_TB.max(), targets_TB.max()))
        if largest >= self.vocab_size:
            raise ValueError(f"token {largest} is outside the model's vocabulary of {self.vocab_size}")
        starts_TB = None if self.starts_after is None else self._starts(tokens_TB, state)
        before = None if state is None else state[0]
        inputs, targets = tokens_TB.to(self.device), targets_TB.to(self.device)
        logits_TBV, after = self.model(inputs, before, starts_TB, keep_state=keep_state)
        nats, best = [], []
        dtype = torch.promote_types(logits_TBV.dtype, torch.float32)
        flat, wanted = logits_TBV.flatten(0, 1), targets.flatten()
        for begin in range(0, len(wanted), PIECE):
            scores, target = flat[begin : begin + PIECE], wanted[begin : begin + PIECE]
            nats.append(F.cross_entropy(scores.to(dtype), target, reduction="none"))
            best.append(scores.argmax(-1) == target)
        shape = tokens_TB.shape
        return Scores(
            torch.cat(nats).view(shape).cpu(),
            torch.cat(best).view(shape).cpu(),
            (after, tokens_TB[-1:]) if keep_state else None,
        )

    def _starts(self, tokens_TB: Tensor, state: Any) -> Tensor:
        """True at the first token of a sequence and after every `starts_after`, which may be the last call's."""
        earlier = torch.full_like(tokens_TB[:1], self.starts_after or 0) if state is None else state[1]
        return torch.eq(torch.cat([earlier, tokens_TB[:-1]]), self.starts_after or 0).to(self.device)


def fingerprint(model: Model) -> str:
    """Hex sha256 of names, dtypes, shapes and bytes of all parameters: what a later run compares."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
