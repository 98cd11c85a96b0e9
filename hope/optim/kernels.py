"""The element-wise arithmetic, compiled to single kernels where the device can."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hope.optim import rules


class Kernels(NamedTuple):
    """`rules.update` and `rules.sums`."""

    update: Callable[[rules.Rule, rules.Stretch, rules.Rates, rules.Whole], None]
    sums: Callable[[rules.Rule, rules.Stretch, rules.Rates, rules.Whole], Tensor]


def kernels_for(parameters: Sequence[Tensor]) -> Kernels:
    """Compiled on a GPU, where every operation of its own would read and write all of memory once more."""
    on_gpu = any(p.is_cuda for p in parameters)
    if on_gpu and importlib.util.find_spec("triton") is not None:
        return compiled()
    return Kernels(rules.update, rules.sums)


def compiled() -> Kernels:
    """By torch's compiler, for any length: tensors and the last chunks of partitions differ in it."""
    return Kernels(torch.compile(rules.update, dynamic=True), torch.compile(rules.sums, dynamic=True))
