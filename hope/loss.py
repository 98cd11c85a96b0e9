"""Cross-entropy of the head a block of tokens at a time: no [T, B, V] of scores is ever held.

For hidden h_t, head W [V, D] and what a place counts c_t (its weight over T B), with p_t = softmax(W h_t),

    loss = sum_t c_t (log sum_v e^{W_v h_t} - W_target h_t),     dscores_t = c_t (p_t - onehot_t)
    dh_t = W^T dscores_t,     dW = sum_t dscores_t h_t^T

A block's scores and their gradient live while the block is worked on: dh and dW are made in the forward pass already,
and the backward pass multiplies them by one number. Three products per block, as many as the plain form has.

Shapes: T time, B batch, D width, V rows of the vocabulary that are here. The plain form is
`hope.model.next_token_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.dense import Form, eager

LARGEST = 2**27
"""Scores that are held at once, at most: 0.5 GiB in fp32. A model that has fewer takes the plain form."""
_ROUND = 256


def block_of(tokens: int, vocabulary: int, wanted: int | None) -> int:
    """Tokens of a block; 0: all scores at once, by the plain form. The one place that has the rule.

    Args:
        tokens, vocabulary: T B of a micro-batch, and V.
        wanted: `train.loss_chunk`; None: by size, the plain form up to `LARGEST` scores.
    """
    if wanted is not None:
        return wanted
    if tokens * vocabulary <= LARGEST:
        return 0
    return max(_ROUND, LARGEST // vocabulary // _ROUND * _ROUND)


def working_bytes(tokens: int, vocabulary: int, width: int, block: int, bytes_per_weight: int) -> int:
    """What the loss needs beside what it saves: scores of a block and their gradient, in fp32 and as the weights are;
    and fp32 sums of the head's gradient."""
    scores = min(block, tokens) * vocabulary * (4 + bytes_per_weight)
    return scores + vocabulary * width * 4


class Unscored(NamedTuple):
    """What scores are made of: hidden [T, B, D] that has entered the head, rows [V, D] of the vocabulary from
    `first_row` on, the tokens of a block, and what its softmax goes through (`hope.dense`)."""

    hidden: Tensor
    weight: Tensor
    first_row: int
    block: int
    form: Form = eager


class OverRanks(NamedTuple):
    """Where ranks share the vocabulary: the largest of all ranks' values, and their sum, of a tensor [n] or [2, n]."""

    largest: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


ALONE = OverRanks(lambda t: t, lambda t: t)


def blockwise_loss(
    scored: Unscored, targets_TB: Tensor, weights_TB: Tensor | None = None, over_ranks: OverRanks = ALONE
) -> Tensor:
    """`next_token_loss` of the scores that are not there, in fp32 (or fp64); the same on all ranks."""
    hidden, weight, first_row, block, form = scored
    places, targets = targets_TB.numel(), targets_TB.flatten()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    counts = torch.full((places,), 1.0 / places, dtype=wide, device=hidden.device)
    if weights_TB is not None:
        counts = weights_TB.flatten().to(wide) / places
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _Blockwise.apply(hidden, weight, targets - first_row, counts, block, over_ranks, form, wanted)
    return loss


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        counts: Tensor,
        block: int,
        over_ranks: OverRanks,
        form: Form,
        wanted: bool,
    ) -> Tensor:
        flat, loss = hidden.flatten(0, 1), counts.new_zeros(())
        if not wanted:
            for h, row, count in zip(*(t.split(block) for t in (flat, rows, counts)), strict=True):
                loss = loss + _block(F.linear(h, weight).to(counts.dtype), row, count, over_ranks)
            return loss
        d_hidden, d_weight = torch.empty_like(flat), counts.new_zeros(weight.shape)
        pieces = zip(*(t.split(block) for t in (flat, rows, counts, d_hidden)), strict=True)
        for h, row, count, d_h in pieces:
            scores = F.linear(h, weight)
            if (
                form is eager or over_ranks is not ALONE or len(row) < block
            ):  # a last, shorter one is not worth a kernel
                gradient = scores.to(counts.dtype)
                part = _block(gradient, row, count, over_ranks)
            else:
                part, gradient = form(block_alone)(scores, row, count)
            loss, gradient = loss + part, gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=d_h)
            d_weight += gradient.mT @ h
        ctx.save_for_backward(d_hidden.view_as(hidden), d_weight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * scale, d_weight * scale, *[None] * 6


def _block(scores: Tensor, row: Tensor, count: Tensor, over_ranks: OverRanks) -> Tensor:
    """The block's part of the loss. `scores` [n, V] become their own gradient.

    row [n]: of the target among these rows; below 0 or above the last: another rank has it.
    """
    scores -= over_ranks.largest(scores.amax(1)).unsqueeze(1)
    elsewhere = (row < 0) | (row >= scores.shape[1])
    place = row.masked_fill(elsewhere, 0).unsqueeze(1)
    target = scores.gather(1, place).squeeze(1).masked_fill(elsewhere, 0.0)
    scores.exp_()
    total, target = over_ranks.total(torch.stack([scores.sum(1), target]))
    scores *= (count / total).unsqueeze(1)
    own = scores.gather(1, place).squeeze(1) - count.masked_fill(elsewhere, 0.0)
    scores.scatter_(1, place, own.unsqueeze(1))
    loss: Tensor = (count * (total.log() - target)).sum()
    return loss


def block_alone(scores: Tensor, row: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """`_block` without ranks and in place of nothing: the loss, and the gradient in the type of `scores`. A compiler
    makes one reduction and one pass of it."""
    wide = scores.to(count.dtype)
    shifted = wide - wide.amax(1, keepdim=True)
    total = shifted.exp().sum(1)
    columns = torch.arange(scores.shape[1], device=scores.device)
    share = shifted.exp() / total.unsqueeze(1) - (columns == row.unsqueeze(1)).to(wide.dtype)
    target = shifted.gather(1, row.unsqueeze(1)).squeeze(1)
    return (count * (total.log() - target)).sum(), (share * count.unsqueeze(1)).to(scores.dtype)
