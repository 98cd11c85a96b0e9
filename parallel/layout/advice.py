"""What would work instead: layouts and batch sizes near the ones that were asked for. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from hope.sections import Problem


class ModelSizes(Protocol):
    """What a layout must divide; `hope.config.ModelConfig` has it."""

    @property
    def heads(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def hidden_per_level(self) -> int:
        """Hidden width of one MLP."""

    def divided_by_mixers(self) -> list[tuple[str, int]]:
        """(key, value) of what mixers divide besides heads."""

    def in_context_heads(self) -> list[int]:
        """MLPs side by side of every level in context."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def near(values: Sequence[int], wanted: int, count: int) -> str:
    """The `count` values nearest to `wanted`, nearest first: "4, 2, 8"."""
    return ", ".join(map(str, sorted(values, key=lambda v: (abs(v - wanted), -v))[:count]))


def near_multiples(value: int, unit: int) -> str:
    """The positive multiples of `unit` on both sides of `value`: "992, 1024"."""
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n > 0)


def layouts_that_fit(world_size: int, wanted: tuple[int, int], model: ModelSizes | None, virtual: int) -> str:
    """Up to three (tensor, pipeline) layouts of `world_size` devices for `model`, nearest to `wanted` first."""
    found = [
        (tensor, pipeline)
        for tensor in divisors(world_size)
        for pipeline in divisors(world_size // tensor)
        if model is None or _fits(model, tensor, pipeline, virtual)
    ]

    def distance(layout: tuple[int, int]) -> tuple[float, int]:
        ratios = [abs(math.log2(have / want)) for have, want in zip(layout, wanted, strict=True)]
        return sum(ratios), layout[0]

    best = sorted(found, key=distance)[:3]
    return " · ".join(f"tensor {t} pipeline {p} (data {world_size // (t * p)})" for t, p in best)


def _fits(model: ModelSizes, tensor: int, pipeline: int, virtual: int) -> bool:
    chunks = pipeline * (virtual if pipeline > 1 else 1)
    mixers = [size for _, size in model.divided_by_mixers()]
    sizes = (model.heads, model.vocab_size, model.hidden_per_level(), *mixers)
    return model.layers >= chunks and not any(size % tensor for size in sizes)


def batch_problems(dp: int, global_batch: int, micro_batch: int, multiple: int = 1) -> Iterator[Problem]:
    """Check that every one of `dp` model replicas gets whole micro-batches, a multiple of `multiple` of them."""
    if micro_batch < 1:
        yield Problem("train.micro_batch", f"is {micro_batch}, but a forward pass needs a sequence", "1 or more")
        return
    unit = micro_batch * dp * multiple
    if global_batch >= unit and global_batch % unit == 0:
        return
    product = f"micro {micro_batch} × dp {dp}"
    if multiple > 1:
        product += f" × pipeline {multiple} (the interleaved schedule takes micro-batches in rounds of {multiple})"
    wrong = f"global {global_batch} sequences is not a positive multiple of {product} = {unit}"
    other = _other_micro(global_batch, micro_batch, dp * multiple)
    yield Problem("train.global_batch", wrong, f"nearest: {near_multiples(global_batch, unit)}{other}")


def _other_micro(global_batch: int, micro_batch: int, parts: int) -> str:
    per_rank, rest = divmod(global_batch, parts)
    if rest or per_rank < 1:
        return ""
    fitting = [m for m in range(min(micro_batch, per_rank), 0, -1) if per_rank % m == 0]
    return f"; or keep {global_batch} with train.micro_batch {fitting[0]}"
