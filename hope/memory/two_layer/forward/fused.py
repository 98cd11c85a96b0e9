"""The loop of `mlp` memories that forget towards their initial states, as Triton kernels.

`hope.memory.two_layer.loop` has the order of the stages, benchmarks/mlp_stages.py what each of them computes. Rows are
tokens. Per chunk of C tokens and memory, with W1 and W2 transposed, g = cumsum(log alpha), g- = g - log alpha and
p = e^{g_C - g}:

    a_k = k W2;  a_v = v W2;  h = silu(a);  x1 = h_k / |h_k|;  e0 = c (k - v + c (h_k - h_v) W1);  m = e0 W1^T
    u1 = (I + T1)^-1 eta (|h_k| e0 + e^{g-} x1 S1),            T1_ts = eta_t e^{g-_t - g_s} x1_t.x1_s for s < t
    u2 = (I + T2)^-1 eta (m silu'(a_k) + e^{g-} k S2),         T2 alike of k
    S1 <- e^{g_C} S1 - x1^T (p u1);    S2 <- e^{g_C} S2 - k^T (p u2)

What `hope.memory.fused` says of products holds here. Beside that:
- the five memories of a head are programs of their own, and k and v need several of them: the loop over chunks is
  outside of the kernels. Its launches cost little in a CUDA graph of the training step, and much without one;
- the states stay fp32 in place in the GPU's memory, 32 KB per memory at K = 64, mostly in its L2 cache;
- (I + T2)^-1 is of k alone, which all memories share: `_project` makes it once;
- a tile that is needed transposed on the left is stored by one kernel, or before a barrier, and loaded so.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hope.memory.fused import _EPS, _TYPES, _add_dot, _decay, _dot, _inverse
from hope.memory.two_layer.loop import Rule, Table

OPTIONS = {"num_warps": 4, "num_stages": 1}


def constants(table: Table, rule: Rule) -> dict[str, Any]:
    """What every kernel takes by name."""
    x = table["x"]
    return {"K": x.shape[2], "C": rule.chunk, "N": table["w1"].shape[1], "TYPE": _TYPES[x.dtype],
            "PRECISION": rule.precision}  # fmt: skip


def sizes(table: Table, rule: Rule) -> tuple[int, int, int]:
    """Sequences times heads, chunks, heads."""
    rows, length, _ = table["x"].shape
    return rows, length // rule.chunk, table["w1"].shape[0]


def pick(table: Table, names: str) -> list[Tensor]:
    """By name; what is not there is never read, and anything stands for it."""
    return [table.get(name, table["x"]) for name in names.split()]


def marks(table: Table, *names: str) -> dict[str, bool]:
    flags = {"valid": "VALID", "resets": "RESETS", "last": "PARTIAL"}
    return {flags[name]: name in table for name in names}


def project(table: Table, rule: Rule, n: int, place: int) -> None:
    rows, chunks, heads = sizes(table, rule)
    with torch.cuda.device_of(table["x"]):
        _project[(rows,)](
            *pick(table, "x a_k a_v g_eta g_alpha w1 w2 read_out s1 s2 valid k v rk rv eta ell inverse"),
            n, chunks, heads, rule.eta_max, rule.contribution,
            LOG_C=rule.chunk.bit_length() - 1, **marks(table, "valid"), **constants(table, rule), **OPTIONS,
        )  # fmt: skip


def write(table: Table, rule: Rule, n: int, place: int) -> None:
    rows, chunks, heads = sizes(table, rule)
    with torch.cuda.device_of(table["x"]):
        _write[(rows, table["w1"].shape[1])](
            *pick(table, "k v eta ell inverse w1 w2 s1 s2 resets last"),
            *pick(table, "start1 start2 u1 u2 x1 ak av dh e0 m inverse1 norm"),
            n, place, rows, chunks, heads, rule.contribution, LOG_C=rule.chunk.bit_length() - 1,
            ALL="ak" in table, **marks(table, "resets", "last"), **constants(table, rule), **OPTIONS,
        )  # fmt: skip


def read_inner(table: Table, rule: Rule, first: int, count: int) -> None:
    _reads(table, rule, first, count, "q k u2 start2 w2 bq hq", OUTER=False)


def read_outer(table: Table, rule: Rule, first: int, count: int) -> None:
    _reads(table, rule, first, count, "hq x1 u1 start1 w1 q y", OUTER=True)


def _reads(table: Table, rule: Rule, first: int, count: int, names: str, OUTER: bool) -> None:
    rows, chunks, heads = sizes(table, rule)
    with torch.cuda.device_of(table["x"]):
        _read[(count, rows)](
            table["ell"], *pick(table, names), first, rows, chunks, heads, rule.contribution,
            OUTER=OUTER, OF_U=table["u1"].shape[2], OF_X1=table["x1"].shape[2], **constants(table, rule), **OPTIONS,
        )  # fmt: skip


@triton.jit
def _gate(a):
    """sigmoid(a)."""
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def _slope(a):
    """silu'(a)."""
    gate = _gate(a)
    return gate * (1.0 + a * (1.0 - gate))


@triton.jit
def _weight(initial_p, initial_at, state_p, state_at, TYPE: tl.constexpr):
    """A layer as it is read: initial state + state."""
    return (tl.load(initial_p + initial_at).to(tl.float32) + tl.load(state_p + state_at).to(tl.float32)).to(TYPE)


@triton.jit
def _solution(keys, eta, ell, g, rC, LOG_C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 of one chunk's keys and gates."""
    T = _dot(keys, tl.trans(keys), PRECISION) * (eta[:, None] * _decay(g - ell, g))
    return _inverse(tl.where(rC[:, None] > rC[None, :], T, 0.0), rC, LOG_C, TYPE, PRECISION).to(TYPE)


@triton.jit(do_not_specialize=["n", "chunks", "heads"])
def _project(
    x_p, ak_p, av_p, ge_p, ga_p, w1_p, w2_p, ro_p, s1_p, s2_p, valid_p,
    k_p, v_p, rk_p, rv_p, eta_p, ell_p, inverse_p, n, chunks, heads, eta_max, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, LOG_C: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """k, v, gates and (I + T2)^-1 of one chunk. A program per sequence and head."""
    m = tl.program_id(0).to(tl.int64)
    batch, head = m // heads, m % heads
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    row = (m * chunks + n) * C
    at, weight, state = row * K + tile, head * N * K * K + square, m * N * K * K + square
    x = tl.load(x_p + at)
    # boxes lie one after the other: k, v, eta, alpha
    a = _dot(x, _weight(w2_p, weight + 2 * K * K, s2_p, state + 2 * K * K, TYPE), PRECISION)
    w = tl.load(w1_p + weight + 2 * K * K).to(tl.float32) + tl.load(s1_p + state + 2 * K * K)
    through = tl.sum(w * tl.load(ro_p + head * 2 * K + rK)[None, :], 1)
    eta = eta_max * _gate(tl.sum(a * _gate(a) * through[None, :], 1) + tl.load(ge_p + row + rC))
    a = _dot(x, _weight(w2_p, weight + 3 * K * K, s2_p, state + 3 * K * K, TYPE), PRECISION)
    w = tl.load(w1_p + weight + 3 * K * K).to(tl.float32) + tl.load(s1_p + state + 3 * K * K)
    through = tl.sum(w * tl.load(ro_p + (head * 2 + 1) * K + rK)[None, :], 1)
    la = tl.sum(a * _gate(a) * through[None, :], 1) + tl.load(ga_p + row + rC)
    ell = tl.minimum(la, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(la)))
    if VALID:  # padding neither writes nor forgets
        real = tl.load(valid_p + batch * chunks * C + n * C + rC)
        eta, ell = eta * real, ell * real
    tl.store(eta_p + row + rC, eta)
    tl.store(ell_p + row + rC, ell)
    a = _dot(x, _weight(w2_p, weight + K * K, s2_p, state + K * K, TYPE), PRECISION)
    hidden = (a * _gate(a)).to(TYPE)
    z = scale * _dot(hidden, _weight(w1_p, weight + K * K, s1_p, state + K * K, TYPE), PRECISION)
    z += tl.load(av_p + at).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(z * z, 1) + _EPS)
    tl.store(rv_p + row + rC, r)
    tl.store(v_p + at, (z * r[:, None]).to(TYPE))
    a = _dot(x, _weight(w2_p, weight, s2_p, state, TYPE), PRECISION)
    hidden = (a * _gate(a)).to(TYPE)
    z = scale * _dot(hidden, _weight(w1_p, weight, s1_p, state, TYPE), PRECISION)
    z += tl.load(ak_p + at).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(z * z, 1) + _EPS)
    tl.store(rk_p + row + rC, r)
    k = (z * r[:, None]).to(TYPE)
    tl.store(k_p + at, k)
    X = _solution(k, eta, ell, tl.cumsum(ell, 0), rC, LOG_C, TYPE, PRECISION)
    tl.store(inverse_p + row * C + rC[:, None] * C + rC[None, :], X)


@triton.jit(do_not_specialize=["n", "place", "rows", "chunks", "heads"])
def _write(
    k_p, v_p, eta_p, ell_p, inverse_p, w1_p, w2_p, s1_p, s2_p, resets_p, last_p,
    start1_p, start2_p, u1_p, u2_p, x1_p, ak_p, av_p, dh_p, e0_p, m_p, inverse1_p, norm_p,
    n, place, rows, chunks, heads, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, LOG_C: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, ALL: tl.constexpr, RESETS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One chunk's writes to one memory: its states in place. For the reads u1, u2, x1 and the states before, of the
    main memory, or of ALL with what the backward needs. A program per sequence, head and memory."""
    m, box = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = m // heads, m % heads
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    row = (m * chunks + n) * C
    at, weight, state = row * K + tile, (head * N + box) * K * K + square, (m * N + box) * K * K + square
    slot = (place * rows + m) * N + box
    kept = slot if ALL else place * rows + m
    first_box: tl.constexpr = 0 if ALL else N - 1
    seen, of_tile = rK[:, None] * 0 + box >= first_box, rC[:, None] * 0 + box >= first_box
    S2 = tl.load(s2_p + state)
    half2 = S2.to(TYPE)
    tl.store(start2_p + kept * K * K + square, half2, mask=seen)
    W2 = (tl.load(w2_p + weight).to(tl.float32) + S2).to(TYPE)
    v, k = tl.load(v_p + at), tl.load(k_p + at)
    a = _dot(v, W2, PRECISION)
    dh = -a * _gate(a)
    if ALL:
        tl.store(av_p + slot * C * K + tile, a.to(TYPE))
    a = _dot(k, W2, PRECISION)
    gate = _gate(a)
    hidden = a * gate
    dh = (dh + hidden).to(TYPE)
    if ALL:
        tl.store(ak_p + slot * C * K + tile, a.to(TYPE))
        tl.store(dh_p + slot * C * K + tile, dh)
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + _EPS)
    x1 = (hidden / norm[:, None]).to(TYPE)
    tl.store(x1_p + slot * C * K + tile, x1)
    slope = gate * (1.0 + a * (1.0 - gate))
    S1 = tl.load(s1_p + state)
    half1 = S1.to(TYPE)
    tl.store(start1_p + kept * K * K + square, half1, mask=seen)
    W1 = (tl.load(w1_p + weight).to(tl.float32) + S1).to(TYPE)
    e0 = scale * (k.to(tl.float32) - v.to(tl.float32)) + scale * scale * _dot(dh, W1, PRECISION)
    error = e0.to(TYPE)
    inner = _dot(error, tl.trans(W1), PRECISION)
    if ALL:
        tl.store(e0_p + slot * C * K + tile, error)
        tl.store(m_p + slot * C * K + tile, inner.to(TYPE))
        tl.store(norm_p + slot * C + rC, norm)
    eta, ell = tl.load(eta_p + row + rC), tl.load(ell_p + row + rC)
    g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
    before = tl.exp(g - ell)
    E1 = e0 * norm[:, None] + before[:, None] * _dot(x1, half1, PRECISION)
    E1 = (eta[:, None] * E1).to(TYPE)
    E2 = inner * slope + before[:, None] * _dot(k, half2, PRECISION)
    E2 = (eta[:, None] * E2).to(TYPE)
    gain, keep = -tl.exp(total - g), tl.exp(total)
    if PARTIAL:  # what is written in an unfinished last chunk is read in it, and not kept
        live = tl.load(last_p + batch) != n
        gain, keep = tl.where(live, gain, 0.0), tl.where(live, keep, 1.0)
    if RESETS:  # the next chunk begins a document
        fresh = (n + 1 < chunks) & (tl.load(resets_p + batch * chunks + tl.minimum(n + 1, chunks - 1)) != 0)
        gain, keep = tl.where(fresh, 0.0, gain), tl.where(fresh, 0.0, keep)
    u = _dot(tl.load(inverse_p + row * C + rC[:, None] * C + rC[None, :]), E2, PRECISION)
    tl.store(u2_p + kept * C * K + tile, u.to(TYPE), mask=of_tile)
    keys = tl.load(k_p + row * K + rK[:, None] + rC[None, :] * K)
    S = _add_dot(keys, (gain[:, None] * u).to(TYPE), keep * tl.load(s2_p + state), PRECISION)
    tl.debug_barrier()  # x1 was stored by other threads, and all of them have read the state
    tl.store(s2_p + state, S)
    X = _solution(tl.load(x1_p + slot * C * K + tile), eta, ell, g, rC, LOG_C, TYPE, PRECISION)
    if ALL:
        tl.store(inverse1_p + slot * C * C + rC[:, None] * C + rC[None, :], X)
    u = _dot(X, E1, PRECISION)
    tl.store(u1_p + kept * C * K + tile, u.to(TYPE), mask=of_tile)
    keys = tl.load(x1_p + slot * C * K + rK[:, None] + rC[None, :] * K)
    S = _add_dot(keys, (gain[:, None] * u).to(TYPE), keep * tl.load(s1_p + state), PRECISION)
    tl.debug_barrier()
    tl.store(s1_p + state, S)


@triton.jit(do_not_specialize=["first", "rows", "chunks", "heads"])
def _read(
    ell_p, q_p, keys_p, u_p, start_p, w_p, b_p, out_p, first, rows, chunks, heads, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    OUTER: tl.constexpr, OF_U: tl.constexpr, OF_X1: tl.constexpr,
):  # fmt: skip
    """f = e^g q S + q W - tril(e^{g_t - g_s} q x^T) u of the main memory, in all chunks of a group. The inner layer's f
    is b, and silu(f) what the OUTER one reads: y = q + c f. There b_p has q. OF_U, OF_X1: memories in these buffers."""
    place, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    row, slot = (m * chunks + first + place) * C, place * rows + m
    at, here = row * K + tile, slot * C * K + tile
    q_at, keys_at = at, at
    if OUTER:
        q_at, keys_at = here, ((slot + 1) * OF_X1 - 1) * C * K + tile
    main = (slot + 1) * OF_U - 1
    q = tl.load(q_p + q_at)
    g = tl.cumsum(tl.load(ell_p + row + rC), 0)
    A = _dot(q, tl.trans(tl.load(keys_p + keys_at)), PRECISION) * _decay(g, g)
    A = tl.where(rC[:, None] >= rC[None, :], -A, 0.0).to(TYPE)
    f = tl.exp(g)[:, None] * _dot(q, tl.load(start_p + main * K * K + square), PRECISION)
    f = _add_dot(q, tl.load(w_p + ((m % heads) * N + N - 1) * K * K + square), f, PRECISION)
    f = _add_dot(A, tl.load(u_p + main * C * K + tile), f, PRECISION)
    if OUTER:
        tl.store(out_p + at, (tl.load(b_p + at).to(tl.float32) + scale * f).to(TYPE))
    else:
        tl.store(b_p + here, f.to(TYPE))
        tl.store(out_p + here, (f * _gate(f)).to(TYPE))
