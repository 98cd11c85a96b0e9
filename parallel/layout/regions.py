"""The regions that a tensor-parallel layout divides: modules with `enter` and `leave` (see `hope.layers`)."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def outermost_regions(module: nn.Module) -> Iterator[Any]:
    """Every region that is inside no other. A region inside a region shares the outer one's borders: with borders of
    its own, its sums over ranks would be taken twice."""
    if hasattr(module, "enter"):
        yield module
        return
    for child in module.children():
        yield from outermost_regions(child)
