"""Parameters of a group as one tensor: a step of an optimizer is then some launches a group, not some a parameter.

A GPU makes the passes of a probe's model in less time than a host needs to update sixty parameters one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNED = 64  # elements: libraries want tensors that begin at multiples of 16 bytes


def flatten(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with one parameter each, for rules that take every coordinate alone (AdamW).

    The parameters of the model are now views of it, and their gradients of its gradient. Backward passes ADD to that.
    Whoever gives a parameter another gradient hides it from the optimizer.
    """
    return [{**group, "params": [_as_one(group["params"])], "names": [group["name"]]} for group in groups]


def _as_one(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    whole = nn.Parameter(torch.cat([_padded(p.detach().flatten()) for p in parameters]))
    whole.grad = torch.zeros_like(whole)
    begin = 0
    for p in parameters:
        end = begin + p.numel()
        p.data, p.grad = whole.data[begin:end].view_as(p), whole.grad[begin:end].view_as(p)
        begin = end + -end % ALIGNED
    return whole


def _padded(flat: Tensor) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % ALIGNED))
