"""The loop over chunks of memories with given keys as one op, and what `hope.memory.linear.linear_memory` is with it.

Shapes: B sequences, H heads, L tokens (a multiple of the chunk), N chunks of C tokens, K width of keys and of values.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.memory.fused_scan import BLOCK

SAVED = ("u", "inverse", "states")
"""What the backward needs of the forward, by name in `hope.memory.given.fused`."""
OUTPUTS = ("y", "end", *SAVED)
# Written out, since what torch infers from annotations differs between its versions.
_LOOP = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor write, Tensor state, bool erase, int chunk, "
    "str precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LOOP_BACKWARD = (
    "(Tensor dy, Tensor dend, Tensor q, Tensor k, Tensor log_decay, Tensor write, Tensor[] saved, bool erase, "
    "int chunk, str precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def fused_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    state: Tensor,
    *,
    erase: bool,
    chunk: int,
    operands: torch.dtype,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor]:
    """`linear_memory` of one decay per head and without documents: products of `operands`, y in that dtype, an fp32
    state. `hope.memory.kernels` says what fits. The result does not depend on the chunk: longer ones are taken as
    blocks of 64 tokens."""
    length, chunk = q.shape[2], min(chunk, BLOCK)
    short = -length % chunk
    padded = lambda t: F.pad(t, (0, 0, 0, short)) if short else t  # tokens that neither write nor forget
    like = k[..., 0].float()
    rate = torch.ones_like(like) if write is None else write.float()
    ell = torch.zeros_like(like) if log_decay is None else log_decay.float().squeeze(-1)
    rate, ell = (padded(t.unsqueeze(-1)).squeeze(-1) for t in (rate, ell))
    q, k, v = (padded(t.to(operands)) for t in (q, k, v))
    y, end, *_ = given_loop(q, k, v, ell, rate, state.float().mT, erase, chunk, precision)
    return y[:, :, :length], end.mT


def _kernels() -> ModuleType:
    return importlib.import_module("hope.memory.given.fused")


@torch.library.custom_op("hope::given_loop", mutates_args=(), schema=_LOOP)
def given_loop(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, write: Tensor, state: Tensor, erase: bool, chunk: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop over chunks, one node for torch.compile.

    Args:
        q, k, v: [B, H, L, K] in the operands' dtype. What is not contiguous is copied.
        log_decay, write: [B, H, L] fp32.
        state: S = W^T [B, H, K, K] fp32 before the first token.
        erase: the delta rule. precision: of products of fp32 operands: ieee, tf32 or tf32x3.
    Returns: y [B, H, L, K]; S at the end, fp32; and what the backward needs, without gradients.
    """
    dense = (t.contiguous() for t in (q, k, v, log_decay, write, state))
    found = _kernels().forward(*dense, erase, chunk, precision)
    return tuple(found[name] for name in OUTPUTS)


@given_loop.register_fake
def _(q, k, v, log_decay, write, state, erase, chunk, precision):  # type: ignore[no-untyped-def]
    batch, heads, length, width = k.shape
    inverse = k.new_empty(batch, heads, length, chunk) if erase else k.new_empty(batch, heads, 0)
    states = k.new_empty(batch, heads, length // chunk, width, width)
    return k.new_empty(k.shape), state.new_empty(state.shape), k.new_empty(k.shape), inverse, states


@torch.library.custom_op("hope::given_loop_backward", mutates_args=(), schema=_LOOP_BACKWARD)
def given_loop_backward(
    dy: Tensor, dend: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, write: Tensor, saved: list[Tensor],
    erase: bool, chunk: int, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay, write and the state, each as its tensor."""
    dense = (t.contiguous() for t in (dy, dend, q, k, log_decay, write))
    found = _kernels().backward(*dense, dict(zip(SAVED, saved, strict=True)), erase, chunk, precision)
    return tuple(found[name] for name in ("dq", "dk", "dv", "dell", "dwrite", "ds0"))


@given_loop_backward.register_fake
def _(dy, dend, q, k, log_decay, write, saved, erase, chunk, precision):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (q, k, k, log_decay, write, dend))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, log_decay, write, _, ctx.erase, ctx.chunk, ctx.precision = inputs
    ctx.save_for_backward(q, k, log_decay, write, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _adjoint(ctx: Any, dy: Tensor | None, dend: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, log_decay, write, *saved = ctx.saved_tensors
    dy = torch.zeros_like(k) if dy is None else dy
    if dend is None:
        dend = k.new_zeros(*k.shape[:2], k.shape[3], k.shape[3], dtype=torch.float32)
    gradients = given_loop_backward(dy, dend, q, k, log_decay, write, saved, ctx.erase, ctx.chunk, ctx.precision)
    return *gradients, None, None, None


given_loop.register_autograd(_adjoint, setup_context=_setup)
