"""Queries, keys and values of heads: from the trunk's layout to the memories', and back.

Trunk activations are [T, B, D]; inside, per head, [B, H, T, K].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents, of_open_document
from hope.layers import CausalConv, rms_norm, unit


def heads_of(x_TBD: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """[T, B, D] -> [B, H, T, K]."""
    x_BHTK: Tensor = x_TBD.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)
    return x_BHTK.to(dtype)


def keys_of(x_TBD: Tensor, head_dim: int, dtype: torch.dtype, positive: bool, normalised: bool) -> Tensor:
    """`heads_of`, then elu(x) + 1, then unit length."""
    x_BHTK = heads_of(x_TBD, head_dim, dtype)
    if positive:
        x_BHTK = F.elu(x_BHTK) + 1
    return unit(x_BHTK) if normalised else x_BHTK


def joined(y_BHTK: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads side by side [T, B, D]."""
    return y_BHTK.to(dtype).permute(2, 0, 1, 3).flatten(-2)


def normed_and_joined(y_BHTK: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`joined` after one RMS norm for all heads, in the memory's precision."""
    return joined(rms_norm(y_BHTK, weight.to(y_BHTK.dtype)), dtype)


def short_convolutions(
    convolutions: Sequence[CausalConv], streams: Sequence[Tensor], history: Tensor, documents: Documents | None
) -> tuple[list[Tensor], Tensor]:
    """Every stream [T, B, D] through its convolution, and the history after this call.

    history: [B, taps-1, sum of D], the last inputs of all streams, side by side.
    """
    taps = convolutions[0].taps
    same = documents.same(taps) if documents is not None and taps > 1 else None
    earlier = history.transpose(0, 1).split([z.shape[-1] for z in streams], -1)
    found = [conv(z, past, same) for conv, z, past in zip(convolutions, streams, earlier, strict=True)]
    latest = torch.cat([z.to(history.dtype) for _, z in found], -1)
    return [z for z, _ in found], of_open_document(latest, documents).transpose(0, 1)
