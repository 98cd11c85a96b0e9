"""The loop over chunks of `mlp` memories as one op, and what `hope.memory.scan.scan` is with it.

What does not wait for the state is made for all tokens at once: a_k = s_k, the static path (learned, projected, x or
nothing), a_v alike, and the static parts of the gates, g_eta = 8 w_eta . x + b_eta, g_alpha alike.

Shapes: B sequences, H heads, L tokens (a multiple of the chunk), K head width = F hidden width, N = 5 memories.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from hope.documents import ChunkLayout
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaState, Gates
from hope.memory.fused_scan import _gapless, _Products, unfinished_chunks
from hope.memory.mlp import MlpBank
from hope.memory.scan import GATE_SCALE, Given, Memories, Scanned, States
from hope.memory.two_layer import loop
from hope.memory.two_layer.loop import KEPT, Rule, Stages, Table

GROUP = 8
"""Chunks between states that are kept. Kept of a layer and head: 10 K^2 fp32 per group and sequence. Made anew while a
group's adjoint runs: its chunks' tensors, 9 x 5 x C K."""
PER_ROW = ("x", "q", "a_k", "a_v", "g_eta", "g_alpha", "s1", "s2")
OUTPUTS = ("y", "s1", "s2", "eta", "ell", *(name for name in KEPT if name not in ("eta", "ell")))
"""What the loop returns: the first three have gradients, the others are for the report and for the backward."""
# Written out, since what torch infers from annotations differs between its versions.
_MARKS = "Tensor? valid, Tensor? resets, Tensor? last"
_RULE = "int chunk, int group, float eta_max, float contribution, str precision"
_LOOP = (
    "(Tensor x, Tensor q, Tensor a_k, Tensor a_v, Tensor g_eta, Tensor g_alpha, Tensor w1, Tensor w2, Tensor read_out, "
    f"Tensor s1, Tensor s2, {_MARKS}, {_RULE}) -> ({', '.join(['Tensor'] * len(OUTPUTS))})"
)
_LOOP_BACKWARD = (
    "(Tensor dy, Tensor dend1, Tensor dend2, Tensor x, Tensor q, Tensor w1, Tensor w2, Tensor read_out, "
    f"Tensor? resets, Tensor? last, Tensor[] kept, {_RULE}) -> ({', '.join(['Tensor'] * 11)})"
)


def two_layer_scan(
    config: MemoryConfig,
    memories: Memories,
    given: Given,
    layout: ChunkLayout,
    state: States | None,
    operands: torch.dtype,
    precision: str,
) -> Scanned:
    """`hope.memory.scan.scan` with matrix products of `operands` and an fp32 state; y in that dtype too.

    `hope.memory.kernels` says what fits. precision: of products of fp32 operands: ieee, tf32 or tf32x3.
    """
    bank = memories.main
    assert isinstance(bank, MlpBank)
    assert memories.shared
    batch, _, _, width = given.x.shape
    wide = torch.promote_types(operands, torch.float32)
    x, q = (t.to(operands, memory_format=torch.contiguous_format).contiguous() for t in (given.x, given.q))
    per_memory = lambda inner: inner.unflatten(-2, (-1, width))  # rows of all memories -> [..., N, F, K]
    w1, w2 = bank.outer.to(wide).mT, per_memory(bank.inner.to(wide)).mT
    shape = (batch, *w1.shape)
    s1, s2 = x.new_zeros(shape, dtype=wide), x.new_zeros(shape, dtype=wide)
    if state is not None:
        s1, s2 = state.main[0].weight.to(wide).mT, per_memory(state.main[1].weight.to(wide)).mT
    read_out = GATE_SCALE * config.contribution * torch.stack([memories.eta_weight, memories.alpha_weight], 1)
    valid = None if layout.valid is None else layout.valid.to(wide).contiguous()
    resets = None if layout.resets is None else layout.resets.int().contiguous()
    y, end1, end2, eta, log_alpha, *_ = two_layer_loop(
        x, q, *_before_the_loop(config, memories, given, x), w1, w2, read_out.to(wide), s1, s2,
        valid, resets, unfinished_chunks(layout, batch, x.device),
        config.projection_chunk, GROUP, config.eta_bound, config.contribution, precision,
    )  # fmt: skip
    states = (DeltaState(end1.mT), DeltaState(end2.mT.flatten(2, 3)))
    gates = Gates(eta, log_alpha, None if valid is None else valid.unsqueeze(1))
    return Scanned(y, States(states, states), [gates])


def _before_the_loop(config: MemoryConfig, memories: Memories, given: Given, x: Tensor) -> tuple[Tensor, ...]:
    """a_k, a_v [B, H, L, K] in x's dtype, g_eta, g_alpha [B, H, L] in at least fp32."""
    weights = GATE_SCALE * torch.stack([memories.eta_weight, memories.alpha_weight], -1)
    if given.static_k is not None and given.static_v is not None:
        static = [w.mT.to(x.dtype) for w in (given.static_k, given.static_v)]
        a_k, a_v, logits = _Products.apply(x, None, None, *static, weights.to(x.dtype))
    else:
        logits = x @ weights.to(x.dtype)
        a_k, a_v = (x, x) if config.static == "identity" else (torch.zeros_like(x), torch.zeros_like(x))
        if given.projected_k is not None and given.projected_v is not None:
            a_k, a_v = given.projected_k.to(x.dtype), given.projected_v.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    # the bias is added in fp32: in bf16 a logit of 8 would be rounded to steps of 1/16, and 1 - alpha to 6 %
    biases = given.eta_bias.to(wide), given.alpha_bias.to(wide)
    g_eta, g_alpha = (t + b.unsqueeze(-1) for t, b in zip(logits.to(wide).unbind(-1), biases, strict=True))
    return a_k, a_v, g_eta, g_alpha


def _stages() -> Stages:
    stages: Stages = importlib.import_module("hope.memory.two_layer.stages").Kernels()
    return stages


def _table(**tensors: Tensor | None) -> Table:
    """Without what is not there and without gaps, sequences and heads in one dimension."""
    there = {name: t for name, t in tensors.items() if t is not None}
    return {n: (t.flatten(0, 1) if n in PER_ROW else t).contiguous() for n, t in there.items()}


@torch.library.custom_op("hope::two_layer_loop", mutates_args=(), schema=_LOOP)
def two_layer_loop(
    x: Tensor, q: Tensor, a_k: Tensor, a_v: Tensor, g_eta: Tensor, g_alpha: Tensor, w1: Tensor, w2: Tensor,
    read_out: Tensor, s1: Tensor, s2: Tensor, valid: Tensor | None, resets: Tensor | None, last: Tensor | None,
    chunk: int, group: int, eta_max: float, contribution: float, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loop over chunks, one node for torch.compile.

    Args:
        x, q, a_k, a_v: [B, H, L, K] in the operands' dtype; the module's docstring has the formulas. What is not
            contiguous is copied.
        g_eta, g_alpha: [B, H, L] fp32. read_out: [H, 2, K] fp32, 8 c times w_eta and w_alpha.
        w1, w2: W1_0^T [H, N, F, K], W2_0^T [H, N, K, F] fp32.
        s1, s2: what W1^T and W2^T differ from them by before the first token, [B, H, N, ...] fp32.
        valid: [B, L] fp32, 0 at padding. resets: [B, chunks] int32, 1 where a chunk begins a document.
        last: [B] int32, the chunk whose writes are not kept, or -1.
        precision: of products of fp32 operands: ieee, tf32 or tf32x3.
    Returns: y [B, H, L, K]; s1 and s2 at the end, fp32; eta and log alpha [B, H, L] fp32, without gradients; and what
        the backward needs, also without.
    """
    marks = {"valid": valid, "resets": resets, "last": last}
    given = _table(
        x=x, q=q, a_k=a_k, a_v=a_v, g_eta=g_eta, g_alpha=g_alpha, w1=w1.to(x.dtype), w2=w2.to(x.dtype),
        read_out=read_out, s1=s1, s2=s2, **marks,
    )  # fmt: skip
    found = loop.forward(_stages(), given, Rule(chunk, group, eta_max, contribution, precision))
    return tuple(found[name].unflatten(0, x.shape[:2]) for name in OUTPUTS)


@two_layer_loop.register_fake
def _(x, q, a_k, a_v, g_eta, g_alpha, w1, w2, read_out, s1, s2, valid, resets, last, chunk, group, *rest):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = x.shape
    tile, row = lambda: x.new_empty(x.shape), lambda: x.new_empty(x.shape[:3], dtype=s1.dtype)
    start = lambda: s1.new_empty(batch, heads, -(-length // chunk // group), *s1.shape[2:])
    state = lambda: s1.new_empty(s1.shape)
    inverse = x.new_empty(batch, heads, length, chunk)
    return tile(), state(), state(), row(), row(), tile(), tile(), row(), row(), inverse, start(), start()


@torch.library.custom_op("hope::two_layer_loop_backward", mutates_args=(), schema=_LOOP_BACKWARD)
def two_layer_loop_backward(
    dy: Tensor, dend1: Tensor, dend2: Tensor, x: Tensor, q: Tensor, w1: Tensor, w2: Tensor, read_out: Tensor,
    resets: Tensor | None, last: Tensor | None, kept: list[Tensor],
    chunk: int, group: int, eta_max: float, contribution: float, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the loop's first eleven arguments, each as its tensor."""
    operands = {"w1": w1.to(x.dtype), "w2": w2.to(x.dtype), "read_out": read_out}
    given = _table(x=x, q=q, **operands, resets=resets, last=last)
    table = {name: t.flatten(0, 1).contiguous() for name, t in zip(KEPT, kept, strict=True)}
    dy, dend1, dend2 = (t.flatten(0, 1).contiguous() for t in (dy, dend1, dend2))
    found = loop.backward(
        _stages(), given, table, dy, dend1, dend2, Rule(chunk, group, eta_max, contribution, precision)
    )
    rows = lambda *names: [found[name].unflatten(0, x.shape[:2]) for name in names]
    over_batch = lambda *names: [t.sum(0) for t in rows(*names)]
    dx = found["dx_of"].sum(1).view_as(x)
    return (dx, *rows("dq", "da_k", "da_v", "dg_eta", "dg_alpha"), *over_batch("dw1", "dw2", "dread_out"),
            *rows("ds1", "ds2"))  # fmt: skip


@two_layer_loop_backward.register_fake
def _(dy, dend1, dend2, x, q, w1, w2, read_out, resets, last, kept, *rest):  # type: ignore[no-untyped-def]
    row = lambda: x.new_empty(x.shape[:3], dtype=dend1.dtype)
    tiles = (x.new_empty(x.shape) for _ in range(4))
    return *tiles, row(), row(), *(t.new_empty(t.shape) for t in (w1, w2, read_out, dend1, dend2))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, q, _, _, _, _, w1, w2, read_out, s1, _, _, resets, last, *ctx.rule = inputs
    found = dict(zip(OUTPUTS, output, strict=True))
    ctx.shape = s1.shape
    ctx.save_for_backward(x, q, w1, w2, read_out, resets, last, *(found[name] for name in KEPT))
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _adjoint(ctx: Any, dy: Tensor | None, *dends: Tensor | None) -> tuple[Tensor | None, ...]:
    x, q, w1, w2, read_out, resets, last, *kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    ends = [w1.new_zeros(ctx.shape) if d is None else d for d in dends[:2]]
    dense = _gapless(dy, *ends)
    gradients = two_layer_loop_backward(*dense, x, q, w1, w2, read_out, resets, last, kept, *ctx.rule)
    return *gradients, *[None] * 8


two_layer_loop.register_autograd(_adjoint, setup_context=_setup)
