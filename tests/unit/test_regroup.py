"""Who owns which tensor: everyone about the same bytes, and what ZeRO holds in one place stays there."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.checkpoint.regroup import Fragment, Unit, _with_owners
from parallel.optimizer.partitions import slices_of


def units(sizes: list[int], ranks: int) -> list[Unit]:
    """Tensors of these sizes in one flat buffer that is cut into equal partitions."""
    partition = math.ceil(sum(sizes) / ranks)
    fragments: dict[int, list[Fragment]] = {}
    for rank in range(ranks):
        for piece in slices_of([(i, str(i), size) for i, size in enumerate(sizes)], partition, rank):
            fragments.setdefault(piece.index, []).append(Fragment(rank, 0, piece.offset, piece.numel))
    return [
        Unit(f"master/{i}", "shard", torch.float32, (size,), (0,), (size,), tuple(fragments[i]), -1)
        for i, size in enumerate(sizes)
    ]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 16))
def test_no_rank_gets_more_than_its_share_and_the_largest_tensor(sizes: list[int], ranks: int) -> None:
    owned = _with_owners(units(sizes, ranks), ranks)
    load = [sum(u.bytes for u in owned if u.owner == rank) for rank in range(ranks)]
    assert sum(load) == 4 * sum(sizes)
    assert max(load) <= 1.05 * 4 * sum(sizes) / ranks + 4 * max(sizes)


def test_few_tensors_move() -> None:
    sizes = [100 + i % 7 for i in range(400)]
    owned = _with_owners(units(sizes, 8), 8)
    moved = sum(f.numel for u in owned for f in u.fragments if f.holder != u.owner)
    assert moved <= 0.03 * sum(sizes)
