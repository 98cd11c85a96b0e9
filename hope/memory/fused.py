"""The loop of `matrix` memories that forget towards their initial state, as Triton kernels: forward and backward.

One state per head and sequence (hope/memory/matrix.py), held transposed on chip, S = R^T [in, out]. Rows are tokens.
Per chunk of C tokens, with d = k - v, g = cumsum(log alpha), g- = g - log alpha and p = e^{g_C - g}:

    r = x S;   k = unit(a_k + r b_k^T), v alike;   eta = eta_max sigmoid(g_eta + r.e_eta), log alpha alike
    T_ts = eta_t e^{g-_t - g_s} k_t.k_s for s < t;   u = (I + T)^-1 eta (d + (e^{g-} k + d) S)
    S <- e^{g_C} S - k^T (p u);       f = e^g q S - tril(e^{g_t - g_s} q k^T) u

A longer chunk is walked in blocks of C = 64 tokens. All of the above then is of a block, but for the state that keys,
values and gates are made from, P at the chunk's start. What earlier blocks of the chunk have written is in S already:

    r = x P, ...;   u = (I + T)^-1 eta (d + d P + e^{g-} k S);   S and f as above

`_sequential` walks over the blocks of one head and sequence. Outputs never feed back: `_outputs` is parallel over
blocks, and so is `_outputs_backward`, which leaves `_sequential_backward` only what must wait for the adjoint of S.

What makes these kernels right and fast, each seen on an H100 with Triton 3.6:
- no product is narrower than 32 (16 columns gave values 0.6 off in bf16), gates are elementwise products and sums;
- no product has a transposed left operand (silently wrong gradients at width 64): transposed tiles are loaded so;
- 4 warps: 2.6 ms per layer at K = 64, where 8 take 4.8 (the 64 rows are then held twice); one pipeline stage, since a
  prefetched k^T would overtake its own store;
- loads stand before the products whose results they meet, else Triton converts whole tiles between layouts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_OPTIONS = {"num_warps": 4, "num_stages": 1}
_EPS = tl.constexpr(1e-6)  # of hope.layers.unit
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
Outcome = dict[str, Tensor]


def forward_options(K: int, blocks: int) -> dict[str, int]:
    """Of `_sequential` with chunks of that many blocks. Heads of 128 with two states spill 6.5 KB of 4 warps' threads
    and 2.1 KB of 8 warps'."""
    return _OPTIONS | {"num_warps": 8 if K > 64 and blocks > 1 else 4}


def backward_options(K: int, dtype: torch.dtype, blocks: int) -> dict[str, int]:
    """Of `_sequential_backward`, which reads nothing that it writes where chunks are one block: the next can be loaded
    meanwhile where both fit, 141 KB for heads of 64. A fifth of its time on an H100, bit for bit the same."""
    ahead = blocks == 1 and K == 64 and dtype.itemsize == 2
    return forward_options(K, blocks) | {"num_stages": 2 if ahead else 1}


def forward(
    x: Tensor, q: Tensor, a_k: Tensor, a_v: Tensor, g_eta: Tensor, g_alpha: Tensor, b_k: Tensor, b_v: Tensor,
    e_eta: Tensor, e_alpha: Tensor, state: Tensor, valid: Tensor | None, resets: Tensor | None, last: Tensor | None,
    chunk: int, block: int, eta_max: float, precision: str,
) -> Outcome:  # fmt: skip
    """All chunks, in blocks of `block` tokens. See `hope.memory.fused_scan.memory_loop` for shapes; every tensor
    contiguous."""
    batch, heads, length, K = x.shape
    blocks, none = length // block, state
    new = lambda *shape, dtype=x.dtype: torch.empty(batch, heads, *shape, dtype=dtype, device=x.device)
    tiles, rows = ("k", "v", "u", "f"), ("rk", "rv", "eta", "ell")
    out = {name: new(length, K) for name in tiles} | {name: new(length, dtype=torch.float32) for name in rows}
    out |= {"inverse": new(length, block), "states": new(blocks, K, K), "end": new(K, K, dtype=torch.float32)}
    common = {"K": K, "C": block, "TYPE": _TYPES[x.dtype], "PRECISION": precision, **_OPTIONS}
    optional = [none if t is None else t for t in (valid, _of_blocks(resets, chunk // block), last)]
    with torch.cuda.device_of(x):
        _sequential[(batch * heads,)](
            x, a_k, a_v, g_eta, g_alpha, b_k.mT.contiguous(), b_v.mT.contiguous(), e_eta, e_alpha, state, *optional,
            *(out[n] for n in ("k", "v", "u", "inverse", "rk", "rv", "eta", "ell", "states", "end")),
            blocks, heads, eta_max, BLOCKS=chunk // block, LOG_C=block.bit_length() - 1,
            VALID=valid is not None, RESETS=resets is not None, PARTIAL=last is not None,
            **common | forward_options(K, chunk // block),
        )  # fmt: skip
        _outputs[(blocks, batch * heads)](q, *(out[n] for n in ("k", "u", "ell", "states", "f")), blocks, **common)
    return out


def backward(
    df: Tensor, dend: Tensor, x: Tensor, q: Tensor, b_k: Tensor, b_v: Tensor, e_eta: Tensor, e_alpha: Tensor,
    resets: Tensor | None, last: Tensor | None, saved: Outcome, chunk: int, eta_max: float, precision: str,
    trace: bool = False,
) -> Outcome:  # fmt: skip
    """Adjoints of what `forward` was given and made: dq, dzk, dzv (of a_k, a_v), dr (of r = x P), dle, dla (of the
    logits g_eta, g_alpha), ds0 (of the state); what lies between the kernels; with `trace` dS of all blocks' starts."""
    batch, heads, length, K = x.shape
    block = saved["inverse"].shape[-1]
    blocks, none = length // block, dend
    new = lambda *shape, dtype=x.dtype: torch.empty(batch, heads, *shape, dtype=dtype, device=x.device)
    tiles, rows = ("dq", "dko", "deo", "kp", "h", "dzk", "dzv", "dr"), ("o", "dle", "dla")
    out = {name: new(length, K) for name in tiles} | {name: new(length, dtype=torch.float32) for name in rows}
    out |= {"dso": new(blocks, K, K), "ds0": new(K, K, dtype=torch.float32)}
    out["trace"] = new(blocks, K, K, dtype=torch.float32) if trace else none
    out["G"] = new(length, K) if chunk > block else none
    common = {"K": K, "C": block, "BLOCKS": chunk // block, "TYPE": _TYPES[x.dtype], "PRECISION": precision, **_OPTIONS}
    pick = lambda table, names: [table[name] for name in names.split()]
    with torch.cuda.device_of(x):
        _outputs_backward[(blocks, batch * heads)](
            df, q, *pick(saved, "k v u inverse ell states"), *pick(out, "dq dko deo kp h dso o"), blocks, **common
        )
        _sequential_backward[(batch * heads,)](
            x, *pick(saved, "k v u"), *pick(out, "h kp"), *pick(saved, "states rk rv eta ell"),
            b_k, b_v, e_eta, e_alpha, *pick(out, "dko deo dso o"), dend,
            *(none if t is None else t for t in (_of_blocks(resets, chunk // block), last)),
            *pick(out, "dzk dzv dr dle dla ds0 trace G"), blocks, heads, eta_max,
            RESETS=resets is not None, PARTIAL=last is not None, TRACE=trace,
            **common | backward_options(K, x.dtype, chunk // block),
        )  # fmt: skip
    return out


def _of_blocks(resets: Tensor | None, blocks: int) -> Tensor | None:
    """Marks of chunks [B, N] as those of their blocks: of the first of each."""
    if resets is None or blocks == 1:
        return resets
    return F.pad(resets.unsqueeze(-1), (0, blocks - 1)).flatten(1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _add_dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _inverse(T, rows, LOG_C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 of a strictly lower T. Diagonal blocks grow 1 -> 2 -> ... -> C: X <- X - X (T between two blocks) X.

    Exact. The product of powers of T is not: they reach 8e3 for equal keys.
    """
    level = rows[:, None] ^ rows[None, :]
    X = tl.where(level == 0, 1.0, 0.0) - tl.where(level == 1, T, 0.0)
    T = T.to(TYPE)
    for bit in tl.static_range(1, LOG_C):
        half = X.to(TYPE)
        TX = _dot(tl.where((level >> bit) == 1, T, 0.0).to(TYPE), half, PRECISION).to(TYPE)
        X -= _dot(half, TX, PRECISION)
    return X


@triton.jit
def _decay(end, start):
    """e^{end_t - start_s}, whose exponent is positive only where the caller masks it: there it could overflow."""
    return tl.exp(tl.minimum(end[:, None] - start[None, :], 0.0))


@triton.jit
def _unit(z, TYPE: tl.constexpr):
    """Rows of unit length, and what they were divided by, inverse."""
    inverse = 1.0 / tl.sqrt(tl.sum(z * z, 1) + _EPS)
    return (z * inverse[:, None]).to(TYPE), inverse


@triton.jit
def _unfinished(last_p, n, place: tl.constexpr, BLOCKS: tl.constexpr):
    """Whether block n is at `place` in the chunk whose writes are not kept."""
    return (tl.load(last_p) == n // BLOCKS) & (n % BLOCKS == place)


@triton.jit(do_not_specialize=["blocks", "heads"])
def _sequential(
    x_p, ak_p, av_p, ge_p, ga_p, bk_p, bv_p, ee_p, ea_p, s0_p, valid_p, resets_p, last_p,
    k_p, v_p, u_p, inverse_p, rk_p, rv_p, eta_p, ell_p, states_p, end_p, blocks, heads, eta_max,
    K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BLOCKS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, VALID: tl.constexpr, RESETS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """k, v, u, (I + T)^-1, gates and every block's S; S at the end. b_k, b_v come transposed. BLOCKS: of a chunk."""
    bh = tl.program_id(0).to(tl.int64)
    batch, head = bh // heads, bh % heads
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    S = tl.load(s0_p + bh * K * K + square)
    first = bh * blocks * C * K + tile
    x, av, ak = tl.load(x_p + first), tl.load(av_p + first), tl.load(ak_p + first)
    for n in range(blocks):
        zero = (2 * n) // (2 * blocks + 1)  # always 0: keeps masks and pointers from waiting in registers for the loop
        row = (bh * blocks + n + zero) * C
        at, hz, rz = row * K + tile, head + zero, rC + zero
        if RESETS:
            S = tl.where(tl.load(resets_p + batch * blocks + n) != 0, 0.0, S)
        half = S.to(TYPE)
        if BLOCKS == 1:
            r = _dot(x, half, PRECISION)
        else:  # both states come from memory when they are needed: kept, they would be spilled
            states = states_p + (bh * blocks + n + zero) * K * K + square
            starts = states - n % BLOCKS * K * K
            tl.store(states, half)
            tl.debug_barrier()  # other threads stored it
            r = _dot(x, tl.load(starts), PRECISION)
            if PARTIAL:
                if _unfinished(last_p + batch, n, 0, BLOCKS):  # set aside: the state after an unfinished chunk
                    tl.store(end_p + bh * K * K + square, S)
        le = tl.sum(r * tl.load(ee_p + hz * K + rK)[None, :], 1) + tl.load(ge_p + row + rC)
        la = tl.sum(r * tl.load(ea_p + hz * K + rK)[None, :], 1) + tl.load(ga_p + row + rC)
        rb = r.to(TYPE)
        z = _add_dot(rb, tl.load(bv_p + hz * K * K + square), av.to(tl.float32), PRECISION)
        v, rv = _unit(z, TYPE)
        z = _add_dot(rb, tl.load(bk_p + hz * K * K + square), ak.to(tl.float32), PRECISION)
        k, rk = _unit(z, TYPE)
        tl.store(k_p + at, k)
        eta = eta_max / (1.0 + tl.exp(-le))
        ell = tl.minimum(la, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(la)))
        if VALID:  # padding neither writes nor forgets
            real = tl.load(valid_p + batch * blocks * C + (n + zero) * C + rC)
            eta, ell = eta * real, ell * real
        g = tl.cumsum(ell, 0)
        before, total = g - ell, tl.sum(ell, 0)
        d = k.to(tl.float32) - v.to(tl.float32)
        if BLOCKS == 1:
            E = _add_dot((tl.exp(before)[:, None] * k.to(tl.float32) + d).to(TYPE), half, d, PRECISION)
        else:
            E = _add_dot(d.to(TYPE), tl.load(starts), d, PRECISION)
            E = _add_dot((tl.exp(before)[:, None] * k.to(tl.float32)).to(TYPE), tl.load(states), E, PRECISION)
        E = (eta[:, None] * E).to(TYPE)
        T = _dot(k, tl.trans(k), PRECISION) * (eta[:, None] * _decay(before, g))
        T = tl.where(rz[:, None] > rz[None, :], T, 0.0)
        if BLOCKS == 1:
            tl.store(states_p + (bh * blocks + n + zero) * K * K + square, half)
        tl.store(v_p + at, v)
        tl.store(rv_p + row + rC, rv)
        tl.store(rk_p + row + rC, rk)
        tl.store(eta_p + row + rC, eta)
        tl.store(ell_p + row + rC, ell)
        tl.debug_barrier()  # k was stored by other threads
        kt = tl.load(k_p + row * K + rK[:, None] + rC[None, :] * K)
        following = (bh * blocks + tl.minimum(n + 1, blocks - 1)) * C * K + tile  # arrives during the inverse
        x, av, ak = tl.load(x_p + following), tl.load(av_p + following), tl.load(ak_p + following)
        X = _inverse(T, rz, LOG_C, TYPE, PRECISION).to(TYPE)
        tl.store(inverse_p + row * C + rC[:, None] * C + rC[None, :], X)
        u = _dot(X, E, PRECISION)
        tl.store(u_p + at, u.to(TYPE))
        gain, keep = -tl.exp(total - g), tl.exp(total)
        if PARTIAL and BLOCKS == 1:  # what is written in an unfinished last chunk is read in it, and not kept
            live = tl.load(last_p + batch) != n
            gain, keep = tl.where(live, gain, 0.0), tl.where(live, keep, 1.0)
        S = _add_dot(kt, (gain[:, None] * u).to(TYPE), keep * S, PRECISION)
        if PARTIAL and BLOCKS > 1:
            if _unfinished(last_p + batch, n, BLOCKS - 1, BLOCKS):
                S = tl.load(end_p + bh * K * K + square)
    tl.store(end_p + bh * K * K + square, S)


@triton.jit(do_not_specialize=["blocks"])
def _outputs(
    q_p, k_p, u_p, ell_p, states_p, f_p, blocks,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f = R_t q_t of every token, from the states that `_sequential` left."""
    number = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    row, at = number * C, number * C * K + rC[:, None] * K + rK[None, :]
    q = tl.load(q_p + at)
    g = tl.cumsum(tl.load(ell_p + row + rC), 0)
    A = _dot(q, tl.trans(tl.load(k_p + at)), PRECISION) * _decay(g, g)
    A = tl.where(rC[:, None] >= rC[None, :], -A, 0.0).to(TYPE)
    state = tl.load(states_p + number * K * K + rK[:, None] * K + rK[None, :])
    f = tl.exp(g)[:, None] * _dot(q, state, PRECISION)
    tl.store(f_p + at, _add_dot(A, tl.load(u_p + at), f, PRECISION).to(TYPE))


@triton.jit(do_not_specialize=["blocks"])
def _outputs_backward(
    df_p, q_p, k_p, v_p, u_p, inverse_p, ell_p, states_p, dq_p, dk_p, de_p, kp_p, h_p, ds_p, o_p, blocks,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr = 1, GIVEN: tl.constexpr = False, ERASE: tl.constexpr = True,
):  # fmt: skip
    """What the outputs say, with A = tril(e^{g_t - g_s} q k^T) and X = (I + T)^-1: dq; parts of dk, of the adjoint of
    E = eta (d + h S) and of dS; o [C], the part of what log alpha gets. For the backward also h = e^{g-} k + d and
    kp = -X^T (p k), through which dS reaches E. In a chunk of several BLOCKS, where d meets P, h = e^{g-} k. GIVEN: for
    `hope.memory.given`, where h = e^g k, and X = I unless ERASE."""
    number = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    row, tile = number * C, rC[:, None] * K + rK[None, :]
    at, state = row * K + tile, number * K * K + rK[:, None] * K + rK[None, :]
    ell = tl.load(ell_p + row + rC)
    g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
    df = tl.load(df_p + at)
    qt = tl.load(q_p + row * K + rK[:, None] + rC[None, :] * K)
    eg = tl.exp(g)[:, None]
    tl.store(ds_p + state, _dot(qt, (eg * df.to(tl.float32)).to(TYPE), PRECISION).to(TYPE))
    q, k, u = tl.load(q_p + at), tl.load(k_p + at), tl.load(u_p + at)
    dA = _dot(df, tl.trans(u), PRECISION) * _decay(g, g)
    dA = tl.where(rC[:, None] >= rC[None, :], -dA, 0.0).to(TYPE)
    dq = eg * _dot(df, tl.trans(tl.load(states_p + state)), PRECISION)
    o = tl.sum(q.to(tl.float32) * dq, 1)
    tl.store(dq_p + at, _add_dot(dA, k, dq, PRECISION).to(TYPE))
    upper = rC[:, None] <= rC[None, :]
    decay = tl.where(upper, -tl.exp(tl.minimum(g[None, :] - g[:, None], 0.0)), 0.0)
    dAt = _dot(u, tl.trans(df), PRECISION) * decay
    At = _dot(k, tl.trans(q), PRECISION)
    W = dAt * At  # once, by rows and by columns: pairs that cancel do so exactly
    o += tl.sum(W, 0) - tl.sum(W, 1)
    tl.store(o_p + row + rC, o)
    tl.store(dk_p + at, _dot(dAt.to(TYPE), q, PRECISION).to(TYPE))
    du = _dot((At * decay).to(TYPE), df, PRECISION).to(TYPE)
    pk = (-tl.exp(total - g)[:, None] * k.to(tl.float32)).to(TYPE)
    if ERASE:
        Xt = tl.load(inverse_p + row * C + rC[:, None] + rC[None, :] * C)
        tl.store(de_p + at, _dot(Xt, du, PRECISION).to(TYPE))
        tl.store(kp_p + at, _dot(Xt, pk, PRECISION).to(TYPE))
    else:
        tl.store(de_p + at, du)
        tl.store(kp_p + at, pk)
    if GIVEN:
        tl.store(h_p + at, (eg * k.to(tl.float32)).to(TYPE))
    elif BLOCKS > 1:
        tl.store(h_p + at, (tl.exp(g - ell)[:, None] * k.to(tl.float32)).to(TYPE))
    else:
        h = (1.0 + tl.exp(g - ell))[:, None] * k.to(tl.float32) - tl.load(v_p + at).to(tl.float32)
        tl.store(h_p + at, h.to(TYPE))


@triton.jit
def _passed(dS, keep, last_p, n, aside_p, BLOCKS: tl.constexpr, PARTIAL: tl.constexpr):
    """dS after block n, what of it reaches what is written there, and its decay. The state after an unfinished chunk is
    the one before it: nothing is reached, and if blocks are between them, dS is set aside until its start."""
    if not PARTIAL:
        return dS, dS, keep
    if BLOCKS == 1:
        live = tl.load(last_p) != n
        return dS, tl.where(live, dS, 0.0), tl.where(live, keep, 1.0)
    if _unfinished(last_p, n, BLOCKS - 1, BLOCKS):
        tl.store(aside_p, dS)
        dS = tl.zeros(dS.shape, tl.float32)
    return dS, dS, keep


@triton.jit
def _pairs(G, u, k, before, g, rows, PRECISION: tl.constexpr):
    """Y, and what pairs of k say to log alpha, by rows and by columns."""
    lower = tl.where(rows[:, None] > rows[None, :], -_decay(before, g), 0.0)
    Y = _dot(G, tl.trans(u), PRECISION) * lower
    W = Y * _dot(k, tl.trans(k), PRECISION)
    by_row, by_column = tl.sum(W, 1), tl.sum(W, 0)
    upper = tl.exp(tl.minimum(before[None, :] - g[:, None], 0.0))
    Y += _dot(u, tl.trans(G), PRECISION) * tl.where(rows[:, None] < rows[None, :], -upper, 0.0)
    return Y, by_row, by_column


@triton.jit
def _at_start(
    dS, x_p, k_p, v_p, G_p, dr_p, last_p, aside_p, n, there, tile, turned,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """dS + dP of a chunk whose tiles begin `there`, SIZE numbers a block, from what its blocks have stored. An
    unfinished one gets what was set aside too."""
    for _ in range(BLOCKS):
        d = tl.load(k_p + there + turned).to(tl.float32) - tl.load(v_p + there + turned).to(tl.float32)
        dS = _add_dot(d.to(TYPE), tl.load(G_p + there + tile), dS, PRECISION)
        dS = _add_dot(tl.load(x_p + there + turned), tl.load(dr_p + there + tile), dS, PRECISION)
        there += SIZE
    if PARTIAL:
        if _unfinished(last_p, n, 0, BLOCKS):
            dS += tl.load(aside_p)
    return dS


@triton.jit(do_not_specialize=["blocks", "heads"])
def _sequential_backward(
    x_p, k_p, v_p, u_p, h_p, kp_p, states_p, rk_p, rv_p, eta_p, ell_p, bk_p, bv_p, ee_p, ea_p,
    dk_p, de_p, ds_p, o_p, dend_p, resets_p, last_p,
    dzk_p, dzv_p, dr_p, dle_p, dla_p, ds0_p, trace_p, G_p, blocks, heads, eta_max,
    K: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    RESETS: tl.constexpr, PARTIAL: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_sequential`, carrying dS only. With G = eta dE and Y the adjoint of k k^T through T, both ways:

        dE = kp dS + deo;   dd = G + G S^T = -dv;   dk = -p (u dS^T) + Y k + dko + e^{g-} G S^T + dd
        dr = dz_k b_k + dz_v b_v + dle e_eta + dla e_alpha;     dS <- e^{g_C} dS + dso + h^T G + x^T dr

    In a chunk of several BLOCKS dd = G + G P^T. dP = d^T G + x^T dr of all of them joins dS at the first one.
    trace: dS of every block's start, for checks.
    """
    bh = tl.program_id(0).to(tl.int64)
    batch, head = bh // heads, bh % heads
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    turned = rK[:, None] + rC[None, :] * K
    dS = tl.load(dend_p + bh * K * K + square)
    for i in range(blocks):
        n, zero = blocks - 1 - i, (2 * i) // (2 * blocks + 1)  # always 0, as in `_sequential`
        row, state = (bh * blocks + n + zero) * C, (bh * blocks + n + zero) * K * K + square
        at, hz, rz = row * K + tile, head + zero, rC + zero
        ell, eta = tl.load(ell_p + row + rC), tl.load(eta_p + row + rC)
        g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
        before, keep = g - ell, tl.exp(total)
        dS, seen, keep = _passed(dS, keep, last_p + batch, n, ds0_p + bh * K * K + square, BLOCKS, PARTIAL)
        through = keep * tl.sum(tl.sum(seen * tl.load(states_p + state).to(tl.float32), 1), 0)
        half = seen.to(TYPE)
        u = tl.load(u_p + at)
        dE = _add_dot(tl.load(kp_p + at), half, tl.load(de_p + at).to(tl.float32), PRECISION)
        written = tl.sum(dE * u.to(tl.float32), 1)
        G = (eta[:, None] * dE).to(TYPE)
        k = tl.load(k_p + at)
        Y, by_row, by_column = _pairs(G, u, k, before, g, rz, PRECISION)
        kf = k.to(tl.float32)
        dk = _dot((-tl.exp(total - g)[:, None] * u.to(tl.float32)).to(TYPE), tl.trans(half), PRECISION)
        kept = tl.sum(kf * dk, 1)
        dk = _add_dot(Y.to(TYPE), k, dk + tl.load(dk_p + at).to(tl.float32), PRECISION)
        v = tl.load(v_p + at)
        dd = _dot(G, tl.trans(tl.load(states_p + state)), PRECISION)
        read = tl.exp(before) * tl.sum(kf * dd, 1)
        dk += tl.exp(before)[:, None] * dd
        if BLOCKS > 1:
            dd = _dot(G, tl.trans(tl.load(states_p + state - n % BLOCKS * K * K)), PRECISION)
        dd += G.to(tl.float32)
        dk += dd
        vf = v.to(tl.float32)
        dz = (tl.load(rv_p + row + rC)[:, None] * (vf * tl.sum(vf * dd, 1)[:, None] - dd)).to(TYPE)
        tl.store(dzv_p + at, dz)
        dr = _dot(dz, tl.load(bv_p + hz * K * K + square), PRECISION)
        dz = (tl.load(rk_p + row + rC)[:, None] * (dk - kf * tl.sum(kf * dk, 1)[:, None])).to(TYPE)
        tl.store(dzk_p + at, dz)
        dr = _add_dot(dz, tl.load(bk_p + hz * K * K + square), dr, PRECISION)
        # log alpha of t decays what was written before it, and scales what is read after it: by keys, pairs, outputs
        after = tl.cumsum(read + by_row - by_column + tl.load(o_p + row + rC), 0, reverse=True)
        dell = through + tl.cumsum(kept, 0) - kept + after - (read + by_row)
        dle, dla = written * (1.0 - eta / eta_max), dell * (1.0 - tl.exp(ell))
        tl.store(dle_p + row + rC, dle)
        tl.store(dla_p + row + rC, dla)
        dr += dle[:, None] * tl.load(ee_p + hz * K + rK)[None, :] + dla[:, None] * tl.load(ea_p + hz * K + rK)[None, :]
        drb = dr.to(TYPE)
        tl.store(dr_p + at, drb)
        dS = keep * dS + tl.load(ds_p + state).to(tl.float32)
        dS = _add_dot(tl.load(h_p + row * K + turned), G, dS, PRECISION)
        if BLOCKS == 1:
            dS = _add_dot(tl.load(x_p + row * K + turned), drb, dS, PRECISION)
        else:
            tl.store(G_p + at, G)
            tl.debug_barrier()  # other threads read G, dr and what is set aside
            if n % BLOCKS == 0:
                dS = _at_start(dS, x_p, k_p, v_p, G_p, dr_p, last_p + batch, ds0_p + bh * K * K + square, n, row * K,
                               tile, turned, C * K, BLOCKS, TYPE, PRECISION, PARTIAL)  # fmt: skip
        if RESETS:  # no gradient reaches the document before
            dS = tl.where(tl.load(resets_p + batch * blocks + n) != 0, 0.0, dS)
        if TRACE:
            tl.store(trace_p + state, dS)
    tl.store(ds0_p + bh * K * K + square, dS)
