"""Needles and facts in a haystack of one's own text, for models that are trained already: items of ordinary tasks.

Needles follow RULER (Hsieh et al., 2024; NVIDIA/RULER, scripts/data/synthetic/niah.py and synthetic.yaml). They differ
in three things: the haystack is one's own text instead of essays, keys come from the lists below, and an answer counts
if greedy decoding gives it literally. Several values are asked in the order in which they stand in the text.

Facts follow bAbI's first task (Weston et al., 2015; WhereIsActor.lua), hidden in text as in BABILong (Kuratov et al.,
2024). The answer is the most probable of six places.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from hope.evaluate.probes.base import generator_of
from hope.evaluate.probes.haystack import Size, hide
from hope.evaluate.tasks import Item

Needle = Literal["single_1", "single_2", "single_3", "multikey", "multivalue", "multiquery"]
NEEDLES: tuple[Needle, ...] = get_args(Needle)
SEVERAL = 4  # keys, values or queries, as in RULER

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
)  # fmt: skip
_ADJECTIVES = ("ancient", "bitter", "calm", "daring", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen",
               "lively", "modest", "noble", "odd", "plain", "quiet", "rapid", "solid", "tidy")  # fmt: skip
_NOUNS = ("anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket", "kettle",
          "ladder", "market", "needle", "orchard", "pepper", "river", "saddle", "temple", "window")  # fmt: skip
_PEOPLE = ("Mary", "John", "Daniel", "Sandra")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_MOVES = ("went to", "moved to", "journeyed to", "travelled to")
FACTS = 8  # sentences of a story


def needle(kind: Needle, length: int, seed: int, index: int, sentences: Sequence[str], size: Size) -> Item:
    """Item `index`: a context of at most `length` tokens and the answer; a pure function of its arguments.

    Args:
        sentences: of the haystack; single_1 has its own.
        size: tokens of a text.
    """
    rng = generator_of(seed, index)
    count = 1 if kind.startswith("single") else SEVERAL
    noun = "uuids" if kind == "single_3" else "numbers"
    values = [_value(rng, noun) for _ in range(count)]
    names = [_ADJECTIVES[n // len(_NOUNS)] + "-" + _NOUNS[n % len(_NOUNS)]
             for n in rng.choice(len(_ADJECTIVES) * len(_NOUNS), count, replace=False).tolist()]  # fmt: skip
    keys = names[:1] * count if kind == "multivalue" else names
    hidden = [
        f"One of the special magic {noun} for {key} is: {value}." for key, value in zip(keys, values, strict=True)
    ]
    asked = [int(rng.integers(count))] if kind == "multikey" else list(range(count))
    who = _listed(list(dict.fromkeys(keys[number] for number in asked)))
    answer = _listed([values[number] for number in asked])
    verb, every, what = ("is", "", noun.removesuffix("s")) if len(asked) == 1 else ("are", "all ", noun)
    before = (
        f"Some special magic {noun} are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {noun} afterwards.\n"
    )
    after = (
        f"\nWhat {verb} {every}the special magic {what} for {who} mentioned in the provided text? "
        f"The special magic {what} for {who} mentioned in the provided text {verb}"
    )
    hay = NOISE if kind == "single_1" else sentences
    context = hide(hidden, hay, rng, lambda parts: before + " ".join(parts) + after, length - size(" " + answer), size)
    return Item(((context, " " + answer),), 0, (len(answer.encode()),))


def facts(length: int, seed: int, index: int, sentences: Sequence[str], size: Size) -> Item:
    """Item `index`: people move; where is one of them? Six choices; a pure function of its arguments."""
    rng = generator_of(seed, index)
    draw = lambda words: words[int(rng.integers(len(words)))]
    moves = [(draw(_PEOPLE), draw(_MOVES), draw(_PLACES)) for _ in range(FACTS)]
    asked = moves[int(rng.integers(FACTS))][0]
    where = next(place for who, _, place in reversed(moves) if who == asked)
    hidden = [f"{who} {move} the {place}." for who, move, place in moves]
    after = f"\nQuestion: Where is {asked}?\nAnswer: {asked} is in the"
    context = hide(hidden, sentences, rng, lambda parts: " ".join(parts) + after, length - size(" bathroom"), size)
    pairs = tuple((context, " " + place) for place in _PLACES)
    return Item(pairs, _PLACES.index(where), tuple(len(place) for place in _PLACES))


def _value(rng: np.random.Generator, noun: str) -> str:
    if noun == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(int(rng.integers(1_000_000, 10_000_000)))  # seven digits


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]
