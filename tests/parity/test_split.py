"""Pipeline stages: consecutive, complete, balanced by FLOPs."""

from __future__ import annotations

import itertools
import time

import pytest

from hope.config import ModelConfig
from hope.model import Model, Slice
from parallel.layout.stages import describe_split, split

SMALL_HEAD = ModelConfig(vocab_size=32, width=64, layers=6, heads=4)
LARGE_HEAD = ModelConfig(vocab_size=32768, width=64, layers=6, heads=4)


def costs(config: ModelConfig, slices: list[Slice]) -> list[float]:
    return [Model(config, part).flops(64).forward for part in slices]


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("config", [SMALL_HEAD, LARGE_HEAD], ids=["small head", "large head"])
def test_no_other_split_has_a_cheaper_largest_stage(config: ModelConfig, chunks: int) -> None:
    slices = [stage[0] for stage in split(config, 64, chunks)]
    assert [slices[0].first, slices[-1].last] == [0, 6]
    assert all(a.last == b.first for a, b in itertools.pairwise(slices))
    every = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), chunks - 1)]
    every_split = [[Slice(a, b) for a, b in itertools.pairwise(bounds)] for bounds in every]
    assert max(costs(config, slices)) == min(max(costs(config, other)) for other in every_split)


def test_a_large_head_leaves_fewer_blocks_to_the_last_stage() -> None:
    assert split(SMALL_HEAD, 64, 2) == [[Slice(0, 3)], [Slice(3, 6)]]
    assert split(LARGE_HEAD, 64, 2) == [[Slice(0, 5)], [Slice(5, 6)]]


def test_virtual_stages_alternate_over_ranks() -> None:
    assert split(SMALL_HEAD, 64, 2, 3) == [
        [Slice(0, 1), Slice(2, 3), Slice(4, 5)],
        [Slice(1, 2), Slice(3, 4), Slice(5, 6)],
    ]
    with pytest.raises(ValueError, match="6 blocks do not fill 8 pipeline chunks"):
        split(SMALL_HEAD, 64, 4, 2)


def test_the_split_is_told_with_its_shares() -> None:
    first, last = describe_split(LARGE_HEAD, 64, 2)
    whole = Model(LARGE_HEAD).flops(64).forward
    shares = [f"{Model(LARGE_HEAD, part).flops(64).forward / whole:.1%}" for part in (Slice(0, 5), Slice(5, 6))]
    assert first == f"stage 0  blocks 0-4 + embedding  {shares[0]} of the FLOPs"
    assert last == f"stage 1  blocks 5 + head  {shares[1]} of the FLOPs"
    assert describe_split(SMALL_HEAD, 64, 2, 3)[1].startswith("stage 1  blocks 1, 3, 5 + head")


def test_a_hundred_layers_are_split_at_once() -> None:
    began = time.monotonic()
    stages = split(ModelConfig(vocab_size=512, width=64, layers=96, heads=4), 1024, 8, 4)
    assert sum(len(stage) for stage in stages) == 32
    assert time.monotonic() - began < 5
