"""The linear family as one function of tensors: a matrix memory whose keys do not depend on it, many chunks at a time.

    W_t = W_{t-1} Diag(a_t) + u_t k_t^T          y_t = W_t q_t
    u_t = b_t v_t                                without erasing
    u_t = b_t (v_t - W_{t-1} Diag(a_t) k_t)      with it: the delta rule, on the decayed state

a_t, the decay, is one number in (0, 1] per head, or one per key channel. b_t is the write rate. The keys are known
beforehand, so that all that happens inside chunks is computed for all chunks at once. What is left of the sequence is
one product per chunk, W <- W P + G. Inside a chunk of C tokens, with g_t = log a_1 + ... + log a_t and W_0 its first
state,

    A_ts = sum_c k_tc k_sc exp(g_tc - g_sc), s < t
    (I + Diag(b) A) U = Diag(b) (V - (K exp(g)) W_0^T)         one triangular solve (WY form; Yang et al., 2024)
    Y = (Q exp(g)) W_0^T + [sum_c q_tc k_sc exp(g_tc - g_sc), s <= t] U

No exponent is ever positive, however strong the decay. The result does not depend on the size of the chunks. Documents
are therefore masks and not a new layout of the tokens, and a call may end anywhere.

Shapes: B sequences, H heads, T tokens, K width of keys, V of values, N chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.memory.delta import decay_ratios
from hope.memory.shapes import shapes_only

LEAF = 4
"""Tokens up to which products with decaying channels are written out in full, [C, C, K]."""


class Marks(NamedTuple):
    """Which tokens share a document, as factors of 0 and 1. seen: [B, 1, N, C, C], token t and token s. carried:
    [B, 1, N, C, 1], the token and the state at the chunk's start. kept: alike, the token and the chunk's last one.
    through: [B, 1, N, 1], the chunk's last token and the state at its start."""

    seen: Tensor
    carried: Tensor
    kept: Tensor
    through: Tensor


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    state: Tensor,
    *,
    erase: bool,
    chunk: int,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All reads and the last state of the rule above. Differentiable in every tensor.

    Args:
        q, k: [B, H, T, K], fp32 or fp64.
        v: [B, H, T, V].
        log_decay: log a, at most 0, [B, H, T, 1] or [B, H, T, K]; None: nothing is forgotten.
        write: b, [B, H, T]; None: 1.
        state: [B, H, V, K], before the first token.
        erase: whether what the memory holds under a key is taken out before the write. Stable while b |k|^2 <= 2.
        chunk: tokens of a chunk, 32 to 128 on a GPU. Changes speed and rounding, not the result.
        segment: [B, T] whole numbers that do not fall, one per document; tokens of number 0 continue `state`.

    Returns: y [B, H, T, V], and the state [B, H, V, K] of the document that is open at the end.
    """
    length = q.shape[2]
    size = min(chunk, 1 << (length - 1).bit_length())
    q, k, v = (_cut(t, size) for t in (q, k, v))
    rate = None if write is None else _cut(write.unsqueeze(-1), size)
    total = None if log_decay is None else _cut(log_decay, size).cumsum(3)
    marks = None if segment is None else marks_of(segment, size)
    start, to_end, whole = _spans(total, marks, k)
    values, erased = v if rate is None else rate * v, None
    if erase:
        system = _products(k, k, total, marks, -1)
        right = torch.cat([v, start * k], -1)
        if rate is not None:
            system, right = rate * system, rate * right
        solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        values, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
    begin, state = _scan(state, whole, values, erased, to_end * k)
    content = values if erased is None else values - erased @ begin.mT
    y = (start * q) @ begin.mT + _products(q, k, total, marks, 0) @ content
    return y.flatten(2, 3)[:, :, :length], state


def in_squares(
    memory: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write: Tensor,
    state: Tensor,
    *,
    erase: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`memory`, which has keys as wide as values, for keys n times as wide: n memories per head whose reads add up.

    The arguments and results of `linear_memory`. Without erasing, parts of a key never meet.

    Raises:
        ValueError: with `erase`.
    """
    if erase:
        raise ValueError("with erasing a write depends on all of a key")
    width, parts = v.shape[-1], k.shape[-1] // v.shape[-1]
    apart = lambda t: t.unflatten(-1, (parts, width)).transpose(2, 3).flatten(1, 2)  # [B, H, *, n V] -> [B, H n, *, V]
    again = lambda t: t.repeat_interleave(parts, 1)
    y, state = memory(
        apart(q), apart(k), again(v), again(log_decay), again(write), apart(state), erase=False, chunk=chunk
    )
    return y.unflatten(1, (-1, parts)).sum(2), state.unflatten(1, (-1, parts)).transpose(2, 3).flatten(-2)


def _cut(x: Tensor, size: int) -> Tensor:
    """[B, H, T, *] -> [B, H, N, C, *]. Zeros at the end are tokens that neither write nor forget."""
    cut: Tensor = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    return cut


def marks_of(segment: Tensor, size: int) -> Marks:
    """The marks of documents [B, T] in chunks of `size`; what fills the last chunk belongs to the last document."""
    short = -segment.shape[1] % size
    number = torch.cat([segment, segment[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, size)).unsqueeze(1)
    last = number[..., -1]
    before = F.pad(last[..., :-1], (1, 0)).unsqueeze(-1)  # the state that is handed in belongs to document 0
    carried = number == before
    return Marks(
        number.unsqueeze(-1) == number.unsqueeze(-2),
        carried.unsqueeze(-1),
        (number == last.unsqueeze(-1)).unsqueeze(-1),
        carried[..., -1:],
    )


def _spans(total: Tensor | None, marks: Marks | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much is left at each token of the state at the chunk's start, and at the chunk's end of each token and of
    that state: [B, H, N, C, 1 or K] twice and [B, H, N, 1 or K]."""
    if total is None:
        one = like.new_ones(1, 1, 1, 1, 1)
        start, to_end, whole = one, one, one[..., 0]
    else:
        start, whole = total.exp(), total[..., -1, :].exp()
        to_end = (total[..., -1:, :] - total).exp()
    if marks is None:
        return start, to_end, whole
    return start * marks.carried, to_end * marks.kept, whole * marks.through


def _products(x: Tensor, k: Tensor, total: Tensor | None, marks: Marks | None, diagonal: int) -> Tensor:
    """sum_c x_tc k_sc exp(g_tc - g_sc) on the lower triangle from `diagonal` down: [B, H, N, C, C]."""
    if total is None:
        found = (x @ k.mT).tril(diagonal)
    elif total.shape[-1] == 1:
        found = (x @ k.mT) * decay_ratios(total.squeeze(-1), total.squeeze(-1), diagonal)
    else:
        found = channel_products(x, k, total).tril(diagonal)
    return found if marks is None else found * marks.seen


def channel_products(x: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum_c x_tc k_sc exp(g_tc - g_sc) for s <= t, 0 above: [..., C, K] three times -> [..., C, C].

    exp(g_t) exp(-g_s) would overflow. Halves meet at their border instead, exp(g_t - g_border) exp(g_border - g_s), and
    each half is divided again: products of matrices, with no exponent above 0.
    """
    size = k.shape[-2]
    if size <= LEAF or size % 2:
        keep = torch.ones(size, size, dtype=torch.bool, device=k.device).tril().unsqueeze(-1)
        gap = total.unsqueeze(-2) - total.unsqueeze(-3)
        # masked before exp: above the diagonal the exponent is positive and can overflow
        ratios = gap.masked_fill(~keep, float("-inf")).exp()
        return (x.unsqueeze(-2) * ratios * k.unsqueeze(-3)).sum(-1)
    x, k, total = (t.unflatten(-2, (2, -1)) for t in (x, k, total))
    inside = channel_products(x, k, total)
    first, second = total.unbind(-3)
    border = first[..., -1:, :]
    late = x[..., 1, :, :] * (second - border).exp()
    early = k[..., 0, :, :] * (border - first).exp()
    above = torch.cat([inside[..., 0, :, :], torch.zeros_like(inside[..., 0, :, :])], -1)
    return torch.cat([above, torch.cat([late @ early.mT, inside[..., 1, :, :]], -1)], -2)


def _scan(state: Tensor, whole: Tensor, values: Tensor, erased: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The state [B, H, N, V, K] at the start of every chunk, and after the last one. keys: k as far as it is left at
    the chunk's end."""
    if shapes_only(state):
        return state.unsqueeze(2).expand(-1, -1, keys.shape[2], -1, -1), state
    gained = values.mT @ keys
    kept = whole.expand(*gained.shape[:3], -1)
    moved = (
        None
        if erased is None
        else kept.unsqueeze(-2) * torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device) - erased.mT @ keys
    )
    begin = []
    for number, gain in enumerate(gained.unbind(2)):
        begin.append(state)
        state = (state * kept[:, :, number, None] if moved is None else state @ moved[:, :, number]) + gain
    return torch.stack(begin, 2), state
