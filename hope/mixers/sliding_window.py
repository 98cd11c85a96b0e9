"""Causal softmax attention to the last W tokens (Beltagy et al., 2020), its work and memory linear in the length.

A block of W queries sees the block of keys before it and its own, 2 W keys, of which a mask leaves each query W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_NOBODY, _FILLED = -1, -2
"""Segments of keys that no query sees, and of what fills the last block up, which sees itself."""


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    always: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Query t sees the keys of its segment among itself and the window - 1 before it.

    Args:
        q: [B, H, T, K], of the last T tokens.
        k, v: [B, H, P + T, K], P < window, of all tokens.
        segments_q, segments_k: [B, T] and [B, P + T], numbers from 0 on, or -1 for a key that no query sees; None: all
            are of one segment.
        always: keys and values [H, N, K] that every query sees besides.
    Returns: [B, H, T, K].
    """
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if segments_q is None or segments_k is None:
        segments_q = torch.zeros(1, length, dtype=torch.long, device=q.device)
        segments_k = segments_q.new_zeros(1, past + length)
    if length <= window:
        mask = _mask(segments_q, segments_k, past, window)[:, None]
        if always is not None:
            k, v, mask = with_always(k, v, mask, always)
        short: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return short
    front, back = window - past, -length % window
    segments_q = F.pad(segments_q, (0, back), value=_FILLED)
    segments_k = F.pad(F.pad(segments_k, (front, 0), value=_NOBODY), (0, back), value=_FILLED)
    batch = q.shape[0]
    blocks = (length + back) // window
    allowed = _mask(segments_q.unflatten(1, (blocks, window)), segments_k.unfold(1, 2 * window, window), window, window)
    # a block becomes a sequence of the batch: [B N, H, W or 2 W, K]
    queries = F.pad(q, (0, 0, 0, back)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    pairs = lambda t: F.pad(t, (0, 0, front, back)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)
    mask = allowed.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    keys, values = pairs(k), pairs(v)
    if always is not None:
        keys, values, mask = with_always(keys, values, mask, always)
    y: Tensor = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    y = y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    return y


def with_always(k: Tensor, v: Tensor, mask: Tensor, always: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, H, S, K] and the mask [..., T, S] with N more keys and values [H, N, K] in front, which all see."""
    front = [extra.expand(k.shape[0], -1, -1, -1) for extra in always]
    return torch.cat([front[0], k], 2), torch.cat([front[1], v], 2), F.pad(mask, (front[0].shape[2], 0), value=True)


def _mask(segments_q: Tensor, segments_k: Tensor, past: int, window: int) -> Tensor:
    """[..., queries, keys]: the same segment, and the query itself or one of the window - 1 before; the first query
    stands `past` tokens behind the first key."""
    query = torch.arange(segments_q.shape[-1], device=segments_q.device)[:, None] + past
    key = torch.arange(segments_k.shape[-1], device=segments_q.device)
    near = (key <= query) & (key > query - window)
    mask: Tensor = near & (segments_q.unsqueeze(-1) == segments_k.unsqueeze(-2))
    return mask
