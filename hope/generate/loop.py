"""Sequences that go on: prompts are read in chunks, then one token at a time with the state that the model carries.

Prompts of different lengths share a batch: the shorter ones begin later, as a new document of their row. Documents do
not see each other, so every sequence is what it would be alone.

Memory does not grow with the sequence for recurrent mixers. Attention keeps the keys and values of all tokens.

Shapes: T time, B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hope.generate.sampling import Sampling, choose, uniform
from hope.generate.text import Writer
from hope.model import Model, States

Forward = Callable[[Tensor, States | None, Tensor | None], tuple[Tensor, States]]
"""(token ids [T, B], state or None, starts [T, B] or None) -> (scores of the last token [B, V], state)."""

CHUNK = 512
"""Tokens that are read at a time: bounds the memory that a long prompt takes."""


def on_one_device(model: Model) -> Forward:
    """What a whole model computes."""

    def forward(tokens_TB: Tensor, state: States | None, starts_TB: Tensor | None) -> tuple[Tensor, States]:
        scores, after = model(tokens_TB, state, starts_TB, last_only=True)
        return scores[-1], after

    return forward


@dataclass(frozen=True)
class Memory:
    """All that a sequence needs in order to go on.

    state: of the model, with one row; None before the first token.
    unread: tokens that the model has not read: the last one that was chosen.
    place: tokens of the sequence, read or not.
    """

    state: States | None = None
    unread: list[int] = field(default_factory=list)
    place: int = 0


class Sequences:
    """Sequences that begin with `prompts` (token ids, none of them empty) and are continued together.

    Args:
        vocabulary: ids below this may be chosen; None: all that the model has.
        memory: of the one sequence that goes on, with what its prompt adds; None: all start anew.
    """

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        device: torch.device,
        *,
        vocabulary: int | None = None,
        chunk: int = CHUNK,
        memory: Memory | None = None,
    ) -> None:
        before = memory or Memory()
        if memory is not None and len(prompts) != 1:
            raise ValueError(f"a memory of one sequence for {len(prompts)} prompts")
        rows = [[*before.unread, *prompt] for prompt in prompts]
        if not rows or not all(rows):
            raise ValueError("a sequence without a token")
        self._forward, self._sampling, self._device = forward, sampling, device
        self._vocabulary, self._chunk, self._state = vocabulary, chunk, before.state
        self._places = [before.place + len(prompt) for prompt in prompts]
        self._copies = _copies(prompts)
        self._unread, self._starts = _aligned(rows)

    @torch.no_grad()
    def next(self) -> list[int]:
        """Read what is not read yet, and choose the next token of every sequence."""
        scores = None
        for first in range(0, len(self._unread), self._chunk):
            tokens = self._unread[first : first + self._chunk].to(self._device)
            starts = None if self._starts is None else self._starts[first : first + self._chunk]
            if starts is not None:
                starts = starts.to(self._device) if starts.any() else None
            scores, self._state = self._forward(tokens, self._state, starts)
        assert scores is not None
        seed = self._sampling.seed
        draws = [uniform(seed, copy, place) for copy, place in zip(self._copies, self._places, strict=True)]
        chosen = choose(scores[:, : self._vocabulary], self._sampling, draws)
        self._unread, self._starts = torch.tensor([chosen]), None
        self._places = [place + 1 for place in self._places]
        return chosen

    def memory(self) -> Memory:
        """What the one sequence needs in order to go on later.

        Raises:
            ValueError: there are several.
        """
        if len(self._places) != 1:
            raise ValueError(f"the memory of one sequence is asked of {len(self._places)}")
        return Memory(self._state, self._unread[:, 0].tolist(), self._places[0])


def _copies(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For every prompt, how many before it are the same: copies draw other tokens."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen[prompt])
        seen[prompt] += 1
    return found


def _aligned(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Token ids [T, B] that all end together, and where the shorter rows begin [T, B]; None if all begin together."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*[0] * (length - len(row)), *row] for row in rows]).T.contiguous()
    if all(len(row) == length for row in rows):
        return tokens, None
    starts = torch.zeros(length, len(rows), dtype=torch.bool)
    for number, row in enumerate(rows):
        starts[length - len(row), number] = True
    return tokens, starts


@dataclass
class Speed:
    """Tokens, and seconds on the clock: of prompts until the first token was chosen, and of the steps after it."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    step_tokens: int = 0
    step_s: float = 0.0

    def __str__(self) -> str:
        rate = lambda tokens, seconds: f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else "n/a"
        return (
            f"prefill {self.prefill_tokens:,} tokens in {self.prefill_s:.2f} s, "
            f"{rate(self.prefill_tokens, self.prefill_s)}; "
            f"steps {self.step_tokens:,} tokens in {self.step_s:.2f} s, {rate(self.step_tokens, self.step_s)}"
        )


def write(
    sequences: Sequences,
    writers: Sequence[Writer],
    tokens: int,
    prompt_tokens: int,
    emit: Callable[[int, str], object] = lambda row, text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Continue until every writer has ended, for at most `tokens` tokens.

    Args:
        writers: one for every sequence.
        prompt_tokens: of all prompts, for the speed.
        emit: called with the number of a sequence and the text that it grew by.
    """
    speed = Speed(prefill_tokens=prompt_tokens)
    for step in range(tokens):
        began = clock()
        chosen = sequences.next()
        took = clock() - began
        if step == 0:
            speed.prefill_s = took
        else:
            speed.step_s += took
            speed.step_tokens += sum(not writer.ended for writer in writers)
        for number, (writer, token) in enumerate(zip(writers, chosen, strict=True)):
            if not writer.ended and (text := writer.push(token)):
                emit(number, text)
        if all(writer.ended for writer in writers):
            break
    return speed
