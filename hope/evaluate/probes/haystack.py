"""Sentences of a text as a haystack, a given number of tokens long, with other sentences hidden in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from hope.evaluate.errors import EvaluationError

Size = Callable[[str], int]
"""Tokens of a text."""
Build = Callable[[Sequence[str]], str]
"""Sentences -> the whole context, with what stands before and behind them."""


def sentences_of(text: str, name: str) -> list[str]:
    """The sentences of a text, white space between them apart. Raises EvaluationError if there are none."""
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n{2,}", text)]
    found = [part for part in found if part]
    if not found:
        raise EvaluationError(f"{name}: no sentences; a haystack needs text")
    return found


def hide(
    hidden: Sequence[str], sentences: Sequence[str], rng: np.random.Generator, build: Build, length: int, size: Size
) -> str:
    """A context of at most `length` tokens, as full as whole sentences make it, with `hidden` in it in order.

    The haystack begins at a random sentence and goes on from the first one after the last. What is hidden stands at
    uniformly random places between sentences.

    Raises:
        EvaluationError: what is hidden alone is longer than `length`.
    """
    start = int(rng.integers(len(sentences)))
    places = np.sort(rng.random(len(hidden)))

    def context(count: int) -> str:
        hay = [sentences[(start + number) % len(sentences)] for number in range(count)]
        for place, sentence in reversed(list(zip(places, hidden, strict=True))):
            hay.insert(int(place * (count + 1)), sentence)
        return build(hay)

    least = size(context(0))
    if least > length:
        raise EvaluationError(f"a length of {length} tokens has no room for what is hidden; {least} or more works")
    low, high = 0, 1
    while size(context(high)) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(context(middle)) <= length else (low, middle)
    return context(low)
