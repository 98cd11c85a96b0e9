"""Between the trunk [T, B, D] and heads [B, H, T, K], as Triton kernels: `memory_input` and `merge_heads`, both ways.

Every array is read once and written once, all arithmetic is in fp32, and sums over tokens are left as one partial sum
per program, which torch adds up in a fixed order: no atomics, two runs are bit-equal. With lag l = 0 .. taps-1, m_l(t)
one where token t - l is of t's document, and w_l the tap of lag l,

    p_t = sum_l w_l m_l(t) z_{t-l};   h = silu(p);   u = h / sqrt(|h|^2 + eps), the norm over a head

    dh = (du - u (u . du)) / sqrt(|h|^2 + eps);   dp = dh silu'(p);   dz_{t-l} += w_l m_l(t) dp_t;   dw_l likewise

`_input_forward` has a tile of tokens of one head and loads it once per lag, from the cache but for the first time. Its
adjoint needs dp of taps tokens for every dz: `_input_backward` walks over the tokens of a segment and keeps what the
last lags need in registers, so that nothing is computed or loaded twice except at a segment's ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_PAST = tl.constexpr(3)  # earlier tokens that a convolution sees, at most
_UNIT_EPS = tl.constexpr(1e-6)  # of hope.layers.unit
_RMS_EPS = tl.constexpr(1e-6)  # of hope.layers.rms_norm
_MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, which knows no instructions of a GPU
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Blocks(NamedTuple):
    """Sizes of programs. tile: numbers of a tile of tokens of one head. segment: tokens that `_input_backward` walks
    over, row: how many numbers of each it has, whole heads; unroll: how many tokens a turn of its loop has."""

    tile: int = 2048
    tile_warps: int = 4
    segment: int = 64
    row: int = 512
    row_warps: int = 4
    unroll: int = 1

    def tokens(self, head_dim: int) -> int:
        """Of a tile."""
        return max(1, self.tile // head_dim)


BLOCKS = Blocks()


def input_forward(
    z: Tensor, weight: Tensor, history: Tensor, same: Tensor | None, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Unit vectors [B, H, T, K] of `dtype`. z [T, B, D] with neighbours in D; weight [D, taps], history [taps-1, B, D]
    and same [taps-1, T, B] without gaps."""
    length, batch, width = z.shape
    heads, tokens = width // head_dim, BLOCKS.tokens(head_dim)
    out = z.new_empty(batch, heads, length, head_dim, dtype=dtype)
    with torch.cuda.device_of(z):
        _input_forward[(batch * heads, triton.cdiv(length, tokens))](
            z, weight, history, _bytes(same, z), out, length, batch, heads, z.stride(0), z.stride(1),
            K=head_dim, BLOCK=tokens, LAGS=weight.shape[1], SAME=same is not None, TYPE=_TYPES[dtype],
            num_warps=BLOCKS.tile_warps,
        )  # fmt: skip
    return out


def input_backward(
    du: Tensor, z: Tensor, weight: Tensor, history: Tensor, same: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dz and dhistory in the dtypes of z and history, dweight [D, taps] in fp32. du [B, H, T, K] without gaps."""
    (length, batch, width), head_dim, taps = z.shape, du.shape[-1], weight.shape[1]
    heads = width // head_dim
    rows = min(max(1, BLOCKS.row // head_dim), triton.next_power_of_2(heads))
    groups, segments = triton.cdiv(heads, rows), triton.cdiv(length, BLOCKS.segment)
    lacking = _PAST.value + 1 - taps  # earlier taps of zero
    if lacking:
        weight, history = F.pad(weight, (lacking, 0)), F.pad(history, (0, 0, 0, 0, lacking, 0))
        same = None if same is None else F.pad(same, (0, 0, 0, 0, 0, lacking))
    dz, dhistory = z.new_empty(z.shape), torch.empty_like(history)
    partial = z.new_empty(segments * batch, taps + lacking, width, dtype=torch.float32)
    with torch.cuda.device_of(z):
        _input_backward[(batch * groups, segments)](
            du, z, weight, history, _bytes(same, z), dz, partial, dhistory,
            length, batch, heads, groups, z.stride(0), z.stride(1),
            K=head_dim, ROWS=rows, SEGMENT=BLOCKS.segment, UNROLL=BLOCKS.unroll, SAME=same is not None,
            num_warps=BLOCKS.row_warps,
        )  # fmt: skip
    return dz, partial.sum(0)[lacking:].mT.contiguous(), dhistory[lacking:]


def merge_forward(y: Tensor, gate: Tensor, weight: Tensor, activation: str) -> Tensor:
    """[T, B, D] of gate's dtype. y [B, H, T, K] and gate [T, B, D] with neighbours in the last dimension."""
    batch, heads, length, head_dim = y.shape
    out, tokens = gate.new_empty(gate.shape), BLOCKS.tokens(head_dim)
    with torch.cuda.device_of(y):
        _merge_forward[(batch * heads, triton.cdiv(length, tokens))](
            y, gate, weight, out, length, batch, heads, *y.stride()[:3], *gate.stride()[:2],
            K=head_dim, BLOCK=tokens, GATE=activation, num_warps=BLOCKS.tile_warps,
        )  # fmt: skip
    return out


def merge_backward(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dy and dgate in the dtypes of y and gate, dweight [K] in fp32. dout [T, B, D] without gaps."""
    batch, heads, length, head_dim = y.shape
    dy, dgate, tokens = y.new_empty(y.shape), gate.new_empty(gate.shape), BLOCKS.tokens(head_dim)
    tiles = triton.cdiv(length, tokens)
    partial = y.new_empty(tiles * batch * heads, head_dim, dtype=torch.float32)
    with torch.cuda.device_of(y):
        _merge_backward[(batch * heads, tiles)](
            dout, y, gate, weight, dy, dgate, partial, length, batch, heads, *y.stride()[:3], *gate.stride()[:2],
            K=head_dim, BLOCK=tokens, GATE=activation, num_warps=BLOCKS.tile_warps,
        )  # fmt: skip
    return dy, dgate, partial.sum(0)


def _bytes(same: Tensor | None, none: Tensor) -> Tensor:
    return none if same is None else same.view(torch.uint8)


@triton.jit
def _sigmoid(x):
    """Four instructions, where exp and a quotient that know denormal numbers are fifteen."""
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * _MINUS_LOG2E], tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
        )


@triton.jit(do_not_specialize=["length", "batch", "heads"])
def _input_forward(
    z_p, w_p, history_p, same_p, out_p, length, batch, heads, z_token, z_row,
    K: tl.constexpr, BLOCK: tl.constexpr, LAGS: tl.constexpr, SAME: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one head. z_token, z_row: strides of z over T and B."""
    number, first = tl.program_id(0), tl.program_id(1) * BLOCK
    b, head = number // heads, number % heads
    rT, rK = tl.arange(0, BLOCK)[:, None], tl.arange(0, K)[None, :]
    t, columns = first + rT, head * K + rK
    inside, tile = t < length, rT * z_token + rK
    z_p += first.to(tl.int64) * z_token + b.to(tl.int64) * z_row + head * K
    weight = w_p + columns * LAGS + LAGS - 1
    p = tl.load(z_p + tile, mask=inside, other=0.0).to(tl.float32) * tl.load(weight).to(tl.float32)
    for lag in tl.static_range(1, LAGS):
        z = tl.load(z_p + tile - lag * z_token, mask=inside & (t >= lag), other=0.0).to(tl.float32)
        before = history_p + ((LAGS - 1 - lag + t) * batch + b) * heads * K + columns
        z += tl.load(before, mask=inside & (t < lag), other=0.0).to(tl.float32)
        if SAME:
            z *= tl.load(same_p + ((lag - 1) * length + t) * batch + b, mask=inside, other=0).to(tl.float32)
        p += z * tl.load(weight - lag).to(tl.float32)
    h = p * _sigmoid(p)
    u = h * tl.rsqrt(tl.sum(h * h, 1)[:, None] + _UNIT_EPS)
    out_p += (number.to(tl.int64) * length + first) * K
    tl.store(out_p + rT * K + rK, u.to(TYPE), mask=inside)


@triton.jit
def _only(head, heads, condition):
    """Which rows of a tile are heads, if the condition holds; a scalar is nothing to `&` with for the interpreter."""
    return head < tl.where(condition, heads, 0)


@triton.jit
def _before(z_p, history_p, lag, tile, columns, head, heads, first, row, rows, z_token):
    """z of the token `lag` before a segment, from z, whose pointer is at the segment's first token, or from history, of
    which `row` of `rows` is taken."""
    z = tl.load(z_p + tile - lag * z_token, mask=_only(head, heads, first > 0), other=0.0).to(tl.float32)
    history_p += (_PAST - lag) * rows + row
    return z + tl.load(history_p + columns, mask=_only(head, heads, first == 0), other=0.0).to(tl.float32)


@triton.jit
def _mark(same_p, lag, t, b, length, batch):
    """m_lag(t), or 0 behind the end."""
    return tl.load(same_p + ((lag - 1) * length + t) * batch + b, mask=t < length, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "batch", "heads", "groups"])
def _input_backward(
    du_p, z_p, w_p, history_p, same_p, dz_p, partial_p, dhistory_p, length, batch, heads, groups, z_token, z_row,
    K: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, UNROLL: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """A segment of tokens of ROWS heads, and the tokens after it that its last ones reach; four taps.

    At token t: z0 .. z3 are z of tokens t .. t - 3, x1 .. x3 those of its document, and s1 .. s3 the sums so far of dz
    of tokens t - 1 .. t - 3. partial: dw of the segment [4, D].
    """
    b, first = tl.program_id(0) // groups, tl.program_id(1) * SEGMENT
    start = (tl.program_id(0) % groups) * ROWS
    rR, rK = tl.arange(0, ROWS)[:, None], tl.arange(0, K)[None, :]
    head, width = start + rR, heads * K
    here, row, rows = head < heads, b * width, batch * width
    within, columns = rR * K + rK, start * K + rR * K + rK
    z_p += first.to(tl.int64) * z_token + b.to(tl.int64) * z_row + start * K
    du_p += ((b.to(tl.int64) * heads + start) * length + first) * K
    of_du = rR.to(tl.int64) * length * K + rK
    dz_p += (first.to(tl.int64) - _PAST) * rows + row
    dhistory_p += row
    stop = tl.minimum(first + SEGMENT, length)
    end = stop + _PAST
    weight = w_p + columns * (_PAST + 1)
    w3, w2 = tl.load(weight, mask=here).to(tl.float32), tl.load(weight + 1, mask=here).to(tl.float32)
    w1, w0 = tl.load(weight + 2, mask=here).to(tl.float32), tl.load(weight + 3, mask=here).to(tl.float32)
    z0 = tl.load(z_p + within, mask=here, other=0.0).to(tl.float32)
    z1 = _before(z_p, history_p, 1, within, columns, head, heads, first, row, rows, z_token)
    z2 = _before(z_p, history_p, 2, within, columns, head, heads, first, row, rows, z_token)
    z3 = _before(z_p, history_p, 3, within, columns, head, heads, first, row, rows, z_token)
    du = tl.load(du_p + of_du, mask=here, other=0.0).to(tl.float32)
    none = tl.zeros([ROWS, K], tl.float32)
    s1, s2, s3, g0, g1, g2, g3 = none, none, none, none, none, none, none
    for step in tl.range(0, end - first, loop_unroll_factor=UNROLL):
        t = first + step
        z_p += z_token
        du_p += K
        more = _only(head, heads, t + 1 < tl.minimum(end, length))
        following = tl.load(z_p + within, mask=more, other=0.0)  # arrive while this token is computed
        following_du = tl.load(du_p + of_du, mask=more, other=0.0)
        x1, x2, x3, v1, v2, v3 = z1, z2, z3, w1, w2, w3
        if SAME:
            m1, m2 = _mark(same_p, 1, t, b, length, batch), _mark(same_p, 2, t, b, length, batch)
            m3 = _mark(same_p, 3, t, b, length, batch)
            x1, x2, x3, v1, v2, v3 = m1 * z1, m2 * z2, m3 * z3, m1 * w1, m2 * w2, m3 * w3
        p = z0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        gate = _sigmoid(p)
        h = p * gate
        inverse = tl.rsqrt(tl.sum(h * h, 1)[:, None] + _UNIT_EPS)
        along = inverse * inverse * inverse * tl.sum(h * du, 1)[:, None]
        dp = (inverse * du - along * h) * (gate + h * (1.0 - gate))
        own = tl.where(t < stop, dp, 0.0)  # of the tokens after the segment dw is another program's
        g0, g1, g2, g3 = g0 + own * z0, g1 + own * x1, g2 + own * x2, g3 + own * x3
        done = s3 + dp * v3
        tl.store(dz_p + columns, done.to(dz_p.dtype.element_ty), mask=_only(head, heads, t - _PAST >= first))
        past = done.to(dhistory_p.dtype.element_ty)
        tl.store(dhistory_p + columns, past, mask=_only(head, heads, t < _PAST))
        dz_p += rows
        dhistory_p += rows
        s3, s2, s1 = s2 + dp * v2, s1 + dp * v1, dp * w0
        z3, z2, z1 = z2, z1, z0
        z0, du = following.to(tl.float32), following_du.to(tl.float32)
    partial_p += (tl.program_id(1).to(tl.int64) * batch + b) * (_PAST + 1) * width
    tl.store(partial_p + columns, g3, mask=here)
    tl.store(partial_p + width + columns, g2, mask=here)
    tl.store(partial_p + 2 * width + columns, g1, mask=here)
    tl.store(partial_p + 3 * width + columns, g0, mask=here)


@triton.jit
def _activation(gate, GATE: tl.constexpr):
    """(act(gate), its derivative), of silu or sigmoid."""
    s = _sigmoid(gate)
    if GATE == "silu":
        return gate * s, s + gate * s * (1.0 - s)
    else:
        return s, s * (1.0 - s)


@triton.jit(do_not_specialize=["length", "batch", "heads"])
def _merge_forward(
    y_p, gate_p, w_p, out_p, length, batch, heads, y_row, y_head, y_token, gate_token, gate_row,
    K: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """out = w y / rms(y) act(gate), of a tile of tokens of one head."""
    b, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = (tl.program_id(1) * BLOCK).to(tl.int64)
    rT, rK = tl.arange(0, BLOCK)[:, None], tl.arange(0, K)[None, :]
    inside, width = first + rT < length, heads * K
    y_p += b.to(tl.int64) * y_row + head.to(tl.int64) * y_head + first * y_token
    gate_p += b.to(tl.int64) * gate_row + first * gate_token + head * K
    y = tl.load(y_p + rT * y_token + rK, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_p + rT * gate_token + rK, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 1)[:, None] / K + _RMS_EPS)
    value, _ = _activation(gate, GATE)
    out = y * inverse * tl.load(w_p + rK).to(tl.float32) * value
    out_p += (first * batch + b) * width + head * K
    tl.store(out_p + rT * batch * width + rK, out.to(out_p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "batch", "heads"])
def _merge_backward(
    dout_p, y_p, gate_p, w_p, dy_p, dgate_p, partial_p, length, batch, heads,
    y_row, y_head, y_token, gate_token, gate_row, K: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """With n = y / rms(y): dn = w act(gate) dout;  dy = (dn - n mean(n dn)) / rms;  partial_p: sums over the tile."""
    number = tl.program_id(0)
    b, head = number // heads, number % heads
    first = (tl.program_id(1) * BLOCK).to(tl.int64)
    rT, rK = tl.arange(0, BLOCK)[:, None], tl.arange(0, K)[None, :]
    inside, width = first + rT < length, heads * K
    y_p += b.to(tl.int64) * y_row + head.to(tl.int64) * y_head + first * y_token
    gate_p += b.to(tl.int64) * gate_row + first * gate_token + head * K
    of_trunk, tile = (first * batch + b) * width + head * K, rT * batch * width + rK
    y = tl.load(y_p + rT * y_token + rK, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_p + rT * gate_token + rK, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_p + of_trunk + tile, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 1)[:, None] / K + _RMS_EPS)
    n, weight = y * inverse, tl.load(w_p + rK).to(tl.float32)
    value, slope = _activation(gate, GATE)
    tl.store(dgate_p + of_trunk + tile, (dout * n * weight * slope).to(dgate_p.dtype.element_ty), mask=inside)
    dnw = dout * value
    dn = dnw * weight
    dy = inverse * (dn - n * (tl.sum(n * dn, 1)[:, None] / K))
    dy_p += (number.to(tl.int64) * length + first) * K
    tl.store(dy_p + rT * K + rK, dy.to(dy_p.dtype.element_ty), mask=inside)
    partial_p += (tl.program_id(1).to(tl.int64) * batch * heads + number) * K
    tl.store(partial_p + tl.arange(0, K), tl.sum(dnw * n, 0))
