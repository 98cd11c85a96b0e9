"""The loop over chunks of `matrix` memories with the kernels of `hope.memory.fused`: what `hope.memory.scan` returns.

All that does not wait for the state is done for all tokens at once, by the libraries' matrix products. With B_box =
M_box,0 + I and c the contribution factor,

    a_k = s_k + x (S_k + c M_k,0)^T, a_v alike;     g_eta = 8 (w_eta + c M_eta,0^T w_eta) . x + b_eta, g_alpha alike
    b_k = c B_k,  b_v = c B_v;                e_eta = 8 c B_eta^T w_eta, e_alpha alike

go into the loop, f_t = R_t q_t comes out of it, and y = q M_main,0^T + f B_main^T. Of the static paths S_k is learned,
s_k projected, the other one zero.

Shapes: B sequences, H heads, L tokens (a multiple of the chunk), N chunks, K head width, C tokens of a block.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hope.documents import ChunkLayout
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaState, Gates
from hope.memory.matrix import MatrixBank
from hope.memory.scan import GATE_SCALE, Given, Memories, Scanned, States

SAVED = ("k", "v", "u", "inverse", "rk", "rv", "eta", "ell", "states")
"""What the backward needs of the forward, by name in `hope.memory.fused`."""
OUTPUTS = ("f", "end", "eta", "ell", "k", "v", "u", "inverse", "rk", "rv", "states")
"""What the loop returns: the first two have gradients."""
BLOCK = 64
"""Tokens that the kernels take at a time. A longer chunk is walked in such blocks, see `hope.memory.fused`."""
# Written out, since what torch infers from annotations differs between its versions.
_ELEVEN = "(" + ", ".join(["Tensor"] * 11) + ")"
_LOOP = (
    "(Tensor x, Tensor q, Tensor a_k, Tensor a_v, Tensor g_eta, Tensor g_alpha, Tensor b_k, Tensor b_v, Tensor e_eta, "
    "Tensor e_alpha, Tensor state, Tensor? valid, Tensor? resets, Tensor? last, int chunk, float eta_max, "
    f"str precision) -> {_ELEVEN}"
)
_LOOP_BACKWARD = (
    "(Tensor df, Tensor dend, Tensor x, Tensor q, Tensor b_k, Tensor b_v, Tensor e_eta, Tensor e_alpha, "
    f"Tensor? resets, Tensor? last, Tensor[] saved, int chunk, float eta_max, str precision) -> {_ELEVEN}"
)


def fused_scan(
    config: MemoryConfig,
    memories: Memories,
    given: Given,
    layout: ChunkLayout,
    state: States | None,
    operands: torch.dtype,
    precision: str,
) -> Scanned:
    """`hope.memory.scan.scan` with matrix products of `operands` and an fp32 state; y in that dtype too.

    `hope.memory.kernels` says what fits. precision: of products of fp32 operands, see `memory_loop`.
    """
    batch, heads, _, width = given.x.shape
    # one copy where the type changes; `to` alone gives back what is of this type already, whatever its strides
    x, q = (t.to(operands, memory_format=torch.contiguous_format).contiguous() for t in (given.x, given.q))
    start = x.new_zeros(batch, heads, width, width, dtype=torch.float32)
    if state is not None:
        start = state.main[0].weight.float().mT.contiguous()
    valid = None if layout.valid is None else layout.valid.float().contiguous()
    resets = None if layout.resets is None else layout.resets.int().contiguous()
    f, end, eta, log_alpha, *_ = memory_loop(
        x, q, *_before_the_loop(config, memories, given, x), start,
        valid, resets, unfinished_chunks(layout, batch, x.device), config.projection_chunk, config.eta_bound, precision,
    )  # fmt: skip
    main = _bank(memories).main
    assert main is not None
    through = lambda m: _per_sequence(m.to(operands).mT, q)
    y = torch.baddbmm(q.flatten(0, 1) @ through(main), f.flatten(0, 1), through(main + _eye(main))).view_as(f)
    states = (DeltaState(end.mT),)
    gates = Gates(eta, log_alpha, None if valid is None else valid.unsqueeze(1))
    return Scanned(y, States(states, states), [gates])


def _bank(memories: Memories) -> MatrixBank:
    assert isinstance(memories.main, MatrixBank)
    assert memories.shared
    return memories.main


def _before_the_loop(config: MemoryConfig, memories: Memories, given: Given, x: Tensor) -> tuple[Tensor, ...]:
    """a_k, a_v [B, H, L, K] in x's dtype; in fp32 g_eta, g_alpha [B, H, L], b_k, b_v [H, K, K] and e_eta, e_alpha."""
    scale, bank = config.contribution, _bank(memories)
    assert bank.stack is not None
    key, value, eta, alpha = bank.stack.float().unflatten(1, (-1, x.shape[-1])).unbind(1)
    eye = _eye(key)
    plain = eye if config.static == "identity" else torch.zeros_like(eye)
    path = lambda static, m: ((plain if static is None else static.float()) + scale * m).to(x.dtype).mT
    w_eta, w_alpha = GATE_SCALE * memories.eta_weight.float(), GATE_SCALE * memories.alpha_weight.float()
    through = lambda w, m: scale * (w.unsqueeze(1) @ m).squeeze(1)
    m_eta, m_alpha = through(w_eta, eta), through(w_alpha, alpha)
    # the bias is added in fp32: in bf16 a logit of 4 would be rounded to steps of 1/32, and 1 - alpha to 3 %
    gates = torch.stack([w_eta + m_eta, w_alpha + m_alpha], -1).to(x.dtype)
    projected = (None if s is None else s.to(x.dtype) for s in (given.projected_k, given.projected_v))
    a_k, a_v, logits = _Products.apply(x, *projected, path(given.static_k, key), path(given.static_v, value), gates)
    biases = given.eta_bias.float(), given.alpha_bias.float()
    g_eta, g_alpha = (t + b.unsqueeze(-1) for t, b in zip(logits.float().unbind(-1), biases, strict=True))
    b_k, b_v = scale * (key + eye), scale * (value + eye)
    e_eta, e_alpha = m_eta + scale * w_eta, m_alpha + scale * w_alpha
    return tuple(t.contiguous() for t in (a_k, a_v, g_eta, g_alpha, b_k, b_v, e_eta, e_alpha))


class _Products(torch.autograd.Function):
    """x W of every W [H, K, N], x [B, H, L, K]; the first two with `first` and `second` [B, H, L, N] added, if given.
    All sums, also of the gradients of x, are made inside of products: by themselves they read and write x's size three
    times each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor | None, second: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.added = first is not None, second is not None
        added = (first, second, *[None] * (len(weights) - 2))
        return tuple(x @ w if s is None else _sum(s, x, w) for s, w in zip(added, weights, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        flat = [g.flatten(0, 1) for g in gradients]
        turned = [_per_sequence(w.mT, x) for w in weights]
        dx = flat[0] @ turned[0]
        for g, w in zip(flat[1:], turned[1:], strict=True):
            dx.baddbmm_(g, w)
        wide = torch.promote_types(x.dtype, torch.float32)
        over_batch = lambda g, w: (x.mT @ g).sum(0, dtype=wide).to(w.dtype)
        of_added = (g if there else None for g, there in zip(gradients[:2], ctx.added, strict=True))
        return dx.view_as(x), *of_added, *(over_batch(g, w) for g, w in zip(gradients, weights, strict=True))


def _per_sequence(w: Tensor, x: Tensor) -> Tensor:
    """w [H, K, N] for every sequence and head of x [B, H, ...], [B H, K, N]."""
    return w.expand(x.shape[0], -1, -1, -1).flatten(0, 1)


def _sum(s: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """s + x w, rounded once."""
    return torch.baddbmm(s.flatten(0, 1), x.flatten(0, 1), _per_sequence(w, x)).view_as(s)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def unfinished_chunks(layout: ChunkLayout, batch: int, device: torch.device) -> Tensor | None:
    """[B] int32: the chunk whose writes a row does not keep, -1 where there is none; None: no row has one."""
    if all(rows is None for rows in layout.partial):
        return None
    found = torch.full((batch,), -1, dtype=torch.int32, device=device)
    for index, rows in enumerate(layout.partial):
        if rows is True:
            found.fill_(index)
        elif isinstance(rows, Tensor):
            found = found.masked_fill(rows, index)
    return found


def _gapless(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them, whatever layout a compiler of the graph around has chosen."""
    return [t.contiguous() for t in tensors]


def _kernels() -> ModuleType:
    return importlib.import_module("hope.memory.fused")


@torch.library.custom_op("hope::memory_loop", mutates_args=(), schema=_LOOP)
def memory_loop(
    x: Tensor, q: Tensor, a_k: Tensor, a_v: Tensor, g_eta: Tensor, g_alpha: Tensor, b_k: Tensor, b_v: Tensor,
    e_eta: Tensor, e_alpha: Tensor, state: Tensor, valid: Tensor | None, resets: Tensor | None, last: Tensor | None,
    chunk: int, eta_max: float, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop over chunks, one node for torch.compile.

    Args:
        x, q, a_k, a_v: [B, H, L, K] in the operands' dtype; the module's docstring has the formulas. What is not
            contiguous is copied.
        g_eta, g_alpha: [B, H, L] fp32. b_k, b_v: [H, K, K] fp32. e_eta, e_alpha: [H, K] fp32.
        state: S = R^T [B, H, K, K] fp32 before the first token.
        valid: [B, L] fp32, 0 at padding. resets: [B, N] int32, 1 where a chunk begins a document.
        last: [B] int32, the chunk whose writes are not kept, or -1.
        chunk: tokens whose keys, values and gates are made from one state, a multiple of `BLOCK` or less than it.
        precision: of products of fp32 operands: ieee, tf32 or tf32x3.
    Returns: f [B, H, L, K]; S at the end, fp32; eta and log alpha [B, H, L] fp32, without gradients; and what the
        backward needs, also without.
    """
    dense = _gapless(x, q, a_k, a_v, g_eta, g_alpha, b_k.to(x.dtype), b_v.to(x.dtype), e_eta, e_alpha, state)
    found = _kernels().forward(*dense, valid, resets, last, chunk, min(chunk, BLOCK), eta_max, precision)
    return tuple(found[name] for name in OUTPUTS)


@memory_loop.register_fake
def _(x, q, a_k, a_v, g_eta, g_alpha, b_k, b_v, e_eta, e_alpha, state, valid, resets, last, chunk, *rest):  # type: ignore[no-untyped-def]
    batch, heads, length, width = x.shape
    tile = lambda: x.new_empty(x.shape)
    row = lambda: x.new_empty(batch, heads, length, dtype=torch.float32)
    block = min(chunk, BLOCK)
    inverse = x.new_empty(batch, heads, length, block)
    states = x.new_empty(batch, heads, length // block, width, width)
    return tile(), state.new_empty(state.shape), row(), row(), tile(), tile(), tile(), inverse, row(), row(), states


@torch.library.custom_op("hope::memory_loop_backward", mutates_args=(), schema=_LOOP_BACKWARD)
def memory_loop_backward(
    df: Tensor, dend: Tensor, x: Tensor, q: Tensor, b_k: Tensor, b_v: Tensor, e_eta: Tensor, e_alpha: Tensor,
    resets: Tensor | None, last: Tensor | None, saved: list[Tensor], chunk: int, eta_max: float, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, q, a_k, a_v, g_eta, g_alpha, b_k, b_v, e_eta, e_alpha and the state, each as its tensor."""
    kept = dict(zip(SAVED, saved, strict=True))
    dense = _gapless(df, dend, x, q, b_k.to(x.dtype), b_v.to(x.dtype), e_eta, e_alpha)
    found = _kernels().backward(*dense, resets, last, kept, chunk, eta_max, precision)
    dr, dle, dla = found["dr"], found["dle"], found["dla"]
    states = kept["states"][:, :, :: chunk // min(chunk, BLOCK)]  # at the chunks' starts
    chunks = lambda t: t.unflatten(2, (states.shape[2], -1))
    dx = (chunks(dr) @ states.mT).flatten(2, 3)
    r = (chunks(x) @ states).flatten(2, 3)
    per_head = lambda t: t.float().sum(0)
    db_k, db_v = per_head(found["dzk"].mT @ r), per_head(found["dzv"].mT @ r)
    # cloned: with one head the two halves are contiguous already, and outputs must not share memory
    de_eta, de_alpha = per_head(torch.stack([dle, dla], 2).to(x.dtype) @ r).unbind(1)
    return (dx, found["dq"], found["dzk"], found["dzv"], dle, dla, db_k, db_v,
            de_eta.clone(), de_alpha.clone(), found["ds0"])  # fmt: skip


@memory_loop_backward.register_fake
def _(df, dend, x, q, b_k, b_v, e_eta, e_alpha, resets, last, saved, chunk, eta_max, precision):  # type: ignore[no-untyped-def]
    row = lambda: x.new_empty(x.shape[:3], dtype=torch.float32)
    like = lambda t: t.new_empty(t.shape)
    return (
        like(x),
        like(q),
        like(x),
        like(x),
        row(),
        row(),
        like(b_k),
        like(b_v),
        like(e_eta),
        like(e_alpha),
        like(dend),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, q, _, _, _, _, b_k, b_v, e_eta, e_alpha, _, _, resets, last, *rest = inputs
    ctx.chunk, ctx.eta_max, ctx.precision = rest
    found = dict(zip(OUTPUTS, output, strict=True))
    ctx.save_for_backward(x, q, b_k, b_v, e_eta, e_alpha, resets, last, *(found[name] for name in SAVED))
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _adjoint(ctx: Any, df: Tensor | None, dend: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, q, b_k, b_v, e_eta, e_alpha, resets, last, *saved = ctx.saved_tensors
    df = torch.zeros_like(x) if df is None else df.contiguous()
    if dend is None:
        dend = x.new_zeros(*x.shape[:2], x.shape[3], x.shape[3], dtype=torch.float32)
    choices = ctx.chunk, ctx.eta_max, ctx.precision
    gradients = memory_loop_backward(
        df, dend.contiguous(), x, q, b_k, b_v, e_eta, e_alpha, resets, last, saved, *choices
    )
    return *gradients, None, None, None, None, None, None


memory_loop.register_autograd(_adjoint, setup_context=_setup)
