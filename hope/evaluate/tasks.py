"""Tasks of JSON lines, one item a line. The format of a line is known by its keys:

completion (LAMBADA; Paperno et al., 2016): context, continuation. Accuracy, greedy decoding gives all of the
    continuation; perplexity of the continuation.
choice (PIQA, ARC, HellaSwag): query, choices, gold. Accuracy of the most probable choice, plain and per byte.
schema (WinoGrande; Trinh and Le, 2018): context_options, continuation, gold. Accuracy of the context under which the
    shared continuation is most probable.

`gold` counts from 0. An optional `delimiter` stands between context and continuation; without it one space does, unless
the context ends with white space, is empty, or the continuation begins with white space. Other keys are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hope.evaluate.errors import EvaluationError
from hope.evaluate.measures import Measure, mean, ratio
from hope.evaluate.rows import Row, Values
from hope.nesting import json_of

Kind = Literal["completion", "choice", "schema"]
Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""

KEYS: Mapping[Kind, tuple[str, ...]] = {
    "completion": ("context", "continuation"),
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
}


@dataclass(frozen=True)
class Item:
    """Pairs (context, continuation with its delimiter) of which each is scored, the number of the right one, and the
    UTF-8 bytes of each continuation without its delimiter."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    text_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Items of one kind."""

    kind: Kind
    items: tuple[Item, ...]


def read_task(lines: Iterable[bytes], name: str, limit: int | None = None, delimiter: str | None = None) -> Task:
    """The task of a file's lines; `name` is the file's, for messages. limit: items at most.

    delimiter: what joins context and continuation where a line does not say; None: a space, as the module says.

    Raises:
        EvaluationError: `name:line` and what is wrong with it, or no items.
    """
    items: list[Item] = []
    kind: Kind | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(items) >= limit:
            break
        try:
            found, item = read_item(line, delimiter)
            if kind is not None and found != kind:
                raise ValueError(f"a {found} item after {kind} items; put each kind into a file of its own")
        except ValueError as error:
            raise EvaluationError(f"{name}:{number}: {error}") from None
        kind = found
        items.append(item)
    if kind is None:
        raise EvaluationError(f"{name}: no items; a line is such as {_EXAMPLE}")
    return Task(kind, tuple(items))


_EXAMPLE = '{"query": "Two and two are", "choices": ["four", "five"], "gold": 0}'


def read_item(line: bytes, given: str | None = None) -> tuple[Kind, Item]:
    """One line, `given` being the delimiter where it has none. Raises ValueError, which does not name the line."""
    try:
        values: Any = json_of(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {type(values).__name__}")
    kinds: list[Kind] = [kind for kind, keys in KEYS.items() if set(keys) <= set(values)]
    if len(kinds) != 1:
        wanted = "; or ".join(", ".join(keys) for keys in KEYS.values())
        raise ValueError(f"keys {', '.join(sorted(values)) or 'none'} are of {len(kinds)} kinds; need {wanted}")
    kind = kinds[0]
    delimiter = values.get("delimiter", given)
    if delimiter is not None and not isinstance(delimiter, str):
        raise ValueError(f"delimiter is {delimiter!r}, not a string")
    if kind == "choice":
        contexts, endings = [_text(values, "query", empty=True)], _texts(values, "choices")
    elif kind == "schema":
        contexts, endings = _texts(values, "context_options"), [_text(values, "continuation")]
    else:
        contexts, endings = [_text(values, "context", empty=True)], [_text(values, "continuation")]
    pairs = [(context, ending) for context in contexts for ending in endings]
    gold = values["gold"] if kind != "completion" else 0
    if type(gold) is not int or not 0 <= gold < len(pairs):
        raise ValueError(f"gold is {gold!r}; it is the number of the right one, 0 to {len(pairs) - 1}")
    joined = tuple((context, _delimiter(context, ending, delimiter) + ending) for context, ending in pairs)
    return kind, Item(joined, gold, tuple(len(ending.encode("utf-8", "replace")) for _, ending in pairs))


def _delimiter(context: str, ending: str, given: str | None) -> str:
    if given is not None:
        return given
    return "" if not context or context[-1].isspace() or ending[0].isspace() else " "


def _text(values: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = values[key]
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{key} is {value!r}; need a {'' if empty else 'non-empty '}string")
    return str(value)


def _texts(values: Mapping[str, Any], key: str) -> list[str]:
    value = values[key]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{key} needs at least two non-empty strings")
    return list(value)


def pair_row(encode: Encode, context: str, continuation: str, eos_id: int, window: int | None = None) -> Row:
    """The row of a context and what follows it, encoded together: the end-of-document token, then all tokens.

    What counts begins with the first token that is not of the context alone. A tokenizer that merges characters across
    the border changes the context's last token, which then counts too. `window`: inputs at most; the context is cut
    from the left, the continuation never.
    """
    whole, alone = encode(context + continuation), encode(context) if context else []
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone))
    )
    first = min(shared, len(whole) - 1)
    ids = np.array([eos_id, *whole], np.int64)
    cut = 0 if window is None else max(0, len(whole) - max(window, len(whole) - first))
    return Row(ids[cut:], first - cut)


def rows_of(task: Task, encode: Encode, eos_id: int, window: int | None) -> list[Row]:
    """All pairs of all items, in order."""
    return [pair_row(encode, *pair, eos_id, window) for item in task.items for pair in item.pairs]


def reduce_pair(index: int, nats: np.ndarray, best: np.ndarray) -> Values:
    """[nats of the continuation, 1 if greedy decoding gives all of it, tokens], as `score_rows` wants it."""
    return [float(nats.sum()), float(best.all()), float(len(nats))]


def result_of(task: Task, values: Mapping[int, Values]) -> dict[str, Any]:
    """Measures of a task from the values of all its pairs: {"kind", "items", measure: {"value", "error"}}."""
    scores = [values[index] for index in range(sum(len(item.pairs) for item in task.items))]
    found: dict[str, Any] = {"kind": task.kind, "items": len(task.items)}
    measures = _completion(task, scores) if task.kind == "completion" else _chosen(task, scores)
    return found | {name: measure.json() for name, measure in measures.items()}


def _completion(task: Task, scores: Sequence[Values]) -> dict[str, Measure]:
    nats = [score[0] for score in scores]
    sizes = [item.text_bytes[0] for item in task.items]
    return {
        "accuracy": mean([score[1] for score in scores]),
        "perplexity": mean(nats).exp(),
        "nats_per_token": ratio(nats, [int(score[2]) for score in scores]),
        "bits_per_byte": ratio(nats, sizes).times(1 / math.log(2)),
    }


def _chosen(task: Task, scores: Sequence[Values]) -> dict[str, Measure]:
    plain, per_byte, chance = [], [], []
    begin = 0
    for item in task.items:
        nats = [score[0] for score in scores[begin : begin + len(item.pairs)]]
        begin += len(item.pairs)
        plain.append(float(int(np.argmin(nats)) == item.gold))
        shares = [one / size for one, size in zip(nats, item.text_bytes, strict=True)]
        per_byte.append(float(int(np.argmin(shares)) == item.gold))
        chance.append(1 / len(item.pairs))
    found = {"accuracy": mean(plain)}
    if task.kind == "choice":  # a schema's continuation is one and the same
        found["accuracy_per_byte"] = mean(per_byte)
    return found | {"chance": Measure(mean(chance).value, None)}
