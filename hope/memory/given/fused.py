"""The loop of `matrix` memories whose keys are given (the linear family), as Triton kernels: forward and backward.

The rules of `hope.memory.linear` with one decay per head. One state per head and sequence, S = W^T [keys, values]. Per
chunk of C tokens, with g = cumsum(log a), h = e^g k and p = e^{g_C - g}:

    T_ts = b_t e^{g_t - g_s} k_t.k_s for s < t;      u = (I + T)^-1 b (h S - v) = w S + u0      (erase; else u = -b v)
    S <- e^{g_C} S - k^T (p u);                      y = e^g q S - tril(e^{g_t - g_s} q k^T) u

Keys do not wait for the state. `_prepare` therefore makes w and u0 of all chunks at once, and `_sequential` has two
products per chunk left. Columns of the state never meet, so that a head's values are divided over programs. Outputs
and their adjoints are those of `hope.memory.fused`. `_sequential_backward` leaves dS of every chunk, from which
`_writes_backward` makes the adjoints of keys, rates and decays in parallel.

What `hope.memory.fused` says of products and warps holds here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hope.memory.fused import _TYPES, _add_dot, _decay, _dot, _inverse, _outputs, _outputs_backward

OPTIONS = {"num_warps": 4, "num_stages": 1}
COLUMNS = 32
"""Values of a head in one program of the sequential kernels: 128 heads' programs are 512 at heads of 128."""
Outcome = dict[str, Tensor]


def wide(K: int) -> dict[str, int]:
    """Warps of `_writes_backward`: with 4, heads of 128 would spill 1 KB of every thread."""
    return {"num_warps": 8 if K > 64 else 4}


def forward(
    q: Tensor, k: Tensor, v: Tensor, ell: Tensor, write: Tensor, state: Tensor, erase: bool, chunk: int, precision: str
) -> Outcome:
    """All chunks. See `hope.memory.given.ops.given_loop` for shapes; every tensor contiguous."""
    batch, heads, length, K = k.shape
    chunks = length // chunk
    new = lambda *shape, dtype=k.dtype: torch.empty(batch, heads, *shape, dtype=dtype, device=k.device)
    out = {"u": new(length, K), "y": new(length, K), "states": new(chunks, K, K)}
    out |= {"end": new(K, K, dtype=torch.float32), "inverse": new(length, chunk) if erase else new(0)}
    common = {"K": K, "C": chunk, "TYPE": _TYPES[k.dtype], "PRECISION": precision, **OPTIONS}
    number = (chunks, batch * heads)
    with torch.cuda.device_of(k):
        w, u0 = (new(length, K), new(length, K)) if erase else (out["u"], out["u"])
        out |= {"w": w, "u0": u0}
        if erase:
            _prepare[number](k, v, write, ell, out["inverse"], w, u0, chunks, LOG_C=chunk.bit_length() - 1, **common)
        else:
            u0.copy_(-write.unsqueeze(-1) * v)
        _sequential[(batch * heads, K // COLUMNS)](
            k, w, u0, ell, state, out["u"], out["states"], out["end"], chunks, V=COLUMNS, ERASE=erase, **common
        )
        _outputs[number](q, k, out["u"], ell, out["states"], out["y"], chunks, **common)
    return out


def backward(
    dy: Tensor, dend: Tensor, q: Tensor, k: Tensor, ell: Tensor, write: Tensor, saved: Outcome, erase: bool,
    chunk: int, precision: str,
) -> Outcome:  # fmt: skip
    """Adjoints dq, dk, dv, dell, dwrite and ds0 of what `forward` was given."""
    batch, heads, length, K = k.shape
    chunks = length // chunk
    new = lambda *shape, dtype=k.dtype: torch.empty(batch, heads, *shape, dtype=dtype, device=k.device)
    out = {name: new(length, K) for name in ("dq", "dk", "dv", "dko", "deo", "kp", "h", "dE")}
    out |= {name: new(length, dtype=torch.float32) for name in ("o", "dell", "dwrite")}
    out |= {"dso": new(chunks, K, K), "dS": new(chunks, K, K), "ds0": new(K, K, dtype=torch.float32)}
    common = {"K": K, "C": chunk, "TYPE": _TYPES[k.dtype], "PRECISION": precision, **OPTIONS}
    pick = lambda table, names: [table[name] for name in names.split()]
    number = (chunks, batch * heads)
    with torch.cuda.device_of(k):
        _outputs_backward[number](
            dy, q, k, k, *pick(saved, "u inverse"), ell, saved["states"], *pick(out, "dq dko deo kp h dso o"), chunks,
            GIVEN=True, ERASE=erase, **common,
        )  # fmt: skip
        _sequential_backward[(batch * heads, K // COLUMNS)](
            *pick(out, "kp deo h"), write, ell, *pick(out, "dso"), dend, *pick(out, "dE dS ds0"), chunks,
            V=COLUMNS, ERASE=erase, **common,
        )  # fmt: skip
        _writes_backward[number](
            k, saved["u"], saved["states"], write, ell, *pick(out, "dE dS dko o dk dv dell dwrite"), chunks,
            ERASE=erase, **common | wide(K),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["chunks"])
def _prepare(
    k_p, v_p, b_p, ell_p, inverse_p, w_p, u0_p, chunks,
    K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + T)^-1 of a chunk, and what u is of the state and without it: u = w S + u0."""
    number = tl.program_id(1).to(tl.int64) * chunks + tl.program_id(0)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    row = number * C
    at = row * K + rC[:, None] * K + rK[None, :]
    k, v = tl.load(k_p + at), tl.load(v_p + at)
    b = tl.load(b_p + row + rC)
    g = tl.cumsum(tl.load(ell_p + row + rC), 0)
    T = _dot(k, tl.trans(k), PRECISION) * (b[:, None] * _decay(g, g))
    X = _inverse(tl.where(rC[:, None] > rC[None, :], T, 0.0), rC, LOG_C, TYPE, PRECISION).to(TYPE)
    tl.store(inverse_p + row * C + rC[:, None] * C + rC[None, :], X)
    tl.debug_barrier()  # other threads stored it
    X = tl.load(inverse_p + row * C + rC[:, None] * C + rC[None, :])  # from memory, as `_outputs_backward` has it
    E = (-b[:, None] * v.to(tl.float32)).to(TYPE)
    tl.store(u0_p + at, _dot(X, E, PRECISION).to(TYPE))
    E = ((b * tl.exp(g))[:, None] * k.to(tl.float32)).to(TYPE)
    tl.store(w_p + at, _dot(X, E, PRECISION).to(TYPE))


@triton.jit(do_not_specialize=["chunks"])
def _sequential(
    k_p, w_p, u0_p, ell_p, s0_p, u_p, states_p, end_p, chunks,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ERASE: tl.constexpr,
):  # fmt: skip
    """u, and every chunk's S; S at the end: V columns of them."""
    bh = tl.program_id(0).to(tl.int64)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    rV = tl.program_id(1) * V + tl.arange(0, V)
    square, tile = rK[:, None] * K + rV[None, :], rC[:, None] * K + rV[None, :]
    S = tl.load(s0_p + bh * K * K + square)
    for n in range(chunks):
        row = (bh * chunks + n) * C
        ell = tl.load(ell_p + row + rC)
        g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
        half = S.to(TYPE)
        tl.store(states_p + (bh * chunks + n) * K * K + square, half)
        u = tl.load(u0_p + row * K + tile).to(tl.float32)
        if ERASE:
            w = tl.load(w_p + row * K + rC[:, None] * K + rK[None, :])
            u = _add_dot(w, half, u, PRECISION)
            tl.store(u_p + row * K + tile, u.to(TYPE))
        # after the first product: loaded before it and kept, bf16 keys gave a wrong second one on an H100 (triton 3.6)
        tl.debug_barrier()
        kt = tl.load(k_p + row * K + rK[:, None] + rC[None, :] * K)
        gain = -tl.exp(total - g)
        S = _add_dot(kt, (gain[:, None] * u).to(TYPE), tl.exp(total) * S, PRECISION)
    tl.store(end_p + bh * K * K + square, S)


@triton.jit(do_not_specialize=["chunks"])
def _sequential_backward(
    kp_p, de_p, h_p, b_p, ell_p, ds_p, dend_p, dE_p, dS_p, ds0_p, chunks,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ERASE: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_sequential`: dE of E = b (h S - v), and dS of every chunk's end.

    dE = kp dS + deo;      dS <- e^{g_C} dS + dso + h^T (b dE)
    """
    bh = tl.program_id(0).to(tl.int64)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    rV = tl.program_id(1) * V + tl.arange(0, V)
    square, tile = rK[:, None] * K + rV[None, :], rC[:, None] * K + rV[None, :]
    dS = tl.load(dend_p + bh * K * K + square)
    for i in range(chunks):
        n = chunks - 1 - i
        row, state = (bh * chunks + n) * C, (bh * chunks + n) * K * K + square
        total = tl.sum(tl.load(ell_p + row + rC), 0)
        before = tl.load(ds_p + state).to(tl.float32)
        half = dS.to(TYPE)
        tl.store(dS_p + state, half)
        kp = tl.load(kp_p + row * K + rC[:, None] * K + rK[None, :])
        dE = _add_dot(kp, half, tl.load(de_p + row * K + tile).to(tl.float32), PRECISION)
        tl.store(dE_p + row * K + tile, dE.to(TYPE))
        dS = tl.exp(total) * dS + before
        if ERASE:
            b = tl.load(b_p + row + rC)
            ht = tl.load(h_p + row * K + rK[:, None] + rC[None, :] * K)
            dS = _add_dot(ht, (b[:, None] * dE).to(TYPE), dS, PRECISION)
    tl.store(ds0_p + bh * K * K + square, dS)


@triton.jit(do_not_specialize=["chunks"])
def _writes_backward(
    k_p, u_p, states_p, b_p, ell_p, dE_p, dS_p, dko_p, o_p, dk_p, dv_p, dell_p, db_p, chunks,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """dk, dv, dell and db of a chunk. With G = b dE and Y the adjoint of k k^T through T, both ways:

    dk = -p (u dS^T) + Y k + e^g G S^T + dko;      dv = -G;      db = dE.u / b      (u is b times something)
    """
    number = tl.program_id(1).to(tl.int64) * chunks + tl.program_id(0)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    row, state = number * C, number * K * K + rK[:, None] * K + rK[None, :]
    at = row * K + rC[:, None] * K + rK[None, :]
    ell, b = tl.load(ell_p + row + rC), tl.load(b_p + row + rC)
    g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
    k, u, half = tl.load(k_p + at), tl.load(u_p + at), tl.load(dS_p + state)
    dE = tl.load(dE_p + at).to(tl.float32)
    written = tl.sum(dE * u.to(tl.float32), 1)
    tl.store(db_p + row + rC, tl.where(b > 0, written / tl.where(b > 0, b, 1.0), 0.0))
    dE = b[:, None] * dE
    G = dE.to(TYPE)
    tl.store(dv_p + at, (-dE).to(TYPE))
    S = tl.load(states_p + state)
    through = tl.exp(total) * tl.sum(tl.sum(half.to(tl.float32) * S.to(tl.float32), 1), 0)
    kf = k.to(tl.float32)
    dk = _dot((-tl.exp(total - g)[:, None] * u.to(tl.float32)).to(TYPE), tl.trans(half), PRECISION)
    kept = tl.sum(kf * dk, 1)
    later = tl.load(o_p + row + rC)
    if ERASE:
        Y = _dot(G, tl.trans(u), PRECISION) * tl.where(rC[:, None] > rC[None, :], -_decay(g, g), 0.0)
        W = Y * _dot(k, tl.trans(k), PRECISION)  # once, by rows and by columns: pairs that cancel do so exactly
        later += tl.sum(W, 1) - tl.sum(W, 0)
        upper = -tl.exp(tl.minimum(g[None, :] - g[:, None], 0.0))
        Y += _dot(u, tl.trans(G), PRECISION) * tl.where(rC[:, None] < rC[None, :], upper, 0.0)
        dk = _add_dot(Y.to(TYPE), k, dk, PRECISION)
        read = tl.exp(g)[:, None] * _dot(G, tl.trans(S), PRECISION)
        later += tl.sum(kf * read, 1)
        dk += read
    tl.store(dk_p + at, (dk + tl.load(dko_p + at).to(tl.float32)).to(TYPE))
    # log a of t decays what was written before it, and scales what is read from it on: by keys, pairs, outputs
    dell = through + tl.cumsum(kept, 0) - kept + tl.cumsum(later, 0, reverse=True)
    tl.store(dell_p + row + rC, dell)
