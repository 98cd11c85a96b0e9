"""The adjoints of `hope.memory.two_layer.forward.fused`'s stages. Rows are tokens, W1, W2 and states are transposed.

A chunk's systems, u = X eta R with R = e + e^{g-} x S, and S' = e^{g_C} S - x^T (p u), are alike in both layers, x the
hidden vector or k. With G = eta dE and Y the adjoint of x x^T through the system, both ways:

    du = -(p x) dS';  dE = X^T du;  de = G;  dx = -p (u dS'^T) + Y x + e^{g-} G S^T;  dS <- e^{g_C} dS' + x^T (e^{g-} G)

`_systems` does that for one layer of every memory. `_errors` takes G of both through errors and hidden vectors to the
layers' weights and to k and v, `_project` the sum over memories through k, v and the gates to x. Of a W = W_0 + S both
parts get what the products say, the initial one summed over all chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hope.memory.fused import _add_dot, _decay, _dot
from hope.memory.two_layer.forward.fused import OPTIONS, _gate, _slope, _weight, constants, marks, pick, sizes
from hope.memory.two_layer.loop import READ_BOXES, Rule, Table


def outer_read_backward(table: Table, rule: Rule, first: int, count: int) -> None:
    names = "dy hq x1 u1 start1 w1 bq db_all hq_all read_dx1 read_du1 read_ds1 read_o1"
    _read_backward(table, rule, first, count, names, OUTER=True)


def inner_read_backward(table: Table, rule: Rule, first: int, count: int) -> None:
    names = "db_all q k u2 start2 w2 dy dq dq read_dk read_du2 read_ds2 read_o2"
    _read_backward(table, rule, first, count, names, OUTER=False)


def _read_backward(table: Table, rule: Rule, first: int, count: int, names: str, OUTER: bool) -> None:
    rows, chunks, heads = sizes(table, rule)
    with torch.cuda.device_of(table["x"]):
        _reads[(count, rows)](
            table["ell"], *pick(table, names), first, rows, chunks, heads, rule.contribution, OUTER=OUTER,
            **constants(table, rule), **OPTIONS,
        )  # fmt: skip


def systems_backward(table: Table, rule: Rule, n: int, place: int) -> None:
    rows, chunks, heads = sizes(table, rule)
    outer = "x1 inverse1 u1 start1 ds1 read_du1 read_dx1 read_ds1 read_o1 g1 dx1"
    inner = "k inverse u2 start2 ds2 read_du2 read_dk read_ds2 read_o2 g2 dk_inner"
    with torch.cuda.device_of(table["x"]):
        for names, OUTER in ((outer, True), (inner, False)):
            _systems[(rows, table["w1"].shape[1])](
                *pick(table, "eta ell resets last"), *pick(table, names), *pick(table, "written dell"),
                n, place, rows, chunks, heads, OUTER=OUTER,
                **marks(table, "resets", "last"), **constants(table, rule), **OPTIONS,
            )  # fmt: skip


def errors_backward(table: Table, rule: Rule, n: int, place: int) -> None:
    rows, chunks, heads = sizes(table, rule)
    with torch.cuda.device_of(table["x"]):
        _errors[(rows, table["w1"].shape[1])](
            *pick(table, "k v ak av dh e0 m x1 norm w1 w2 start1 start2 g1 g2 dx1 dk_inner"),
            *pick(table, "dm dk dv ds1 ds2 dw1 dw2"),
            n, place, rows, chunks, heads, rule.contribution, **constants(table, rule), **OPTIONS,
        )  # fmt: skip


def project_backward(table: Table, rule: Rule, n: int, place: int) -> None:
    rows, chunks, heads = sizes(table, rule)
    both = "x w1 w2 start1 start2 hx dx_of ds1 ds2 dw1 dw2"
    with torch.cuda.device_of(table["x"]):
        _keys[(rows, 2)](
            *pick(table, both), *pick(table, "k v rk rv dk dv read_dk da_k da_v"),
            n, place, rows, chunks, heads, rule.contribution, BOXES=READ_BOXES, **constants(table, rule), **OPTIONS,
        )  # fmt: skip
        _gates[(rows, 2)](
            *pick(table, both), *pick(table, "eta ell written dell read_out dg_eta dg_alpha dread_out"),
            n, place, rows, chunks, heads, rule.eta_max, BOXES=READ_BOXES, **constants(table, rule), **OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rows", "chunks", "heads"])
def _reads(
    ell_p, df_p, q_p, keys_p, u_p, start_p, w_p, other_p, dq_p, copy_p, dkeys_p, du_p, ds_p, o_p,
    first, rows, chunks, heads, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    OUTER: tl.constexpr,
):  # fmt: skip
    """The adjoint of `_read`, in all chunks of a group: of queries, keys, u, S, and the part o of what g gets. OUTER:
    df is c dy, other_p has b, and the adjoint of b is stored with a copy of the queries. Else other_p has dy, a part
    of dq."""
    place, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    turned = rK[:, None] + rC[None, :] * K
    row, slot = (m * chunks + first + place) * C, place * rows + m
    main = (slot + 1) * N - 1
    at, here = row * K + tile, slot * C * K + tile
    q_from, keys_from = row * K, row * K
    if OUTER:
        q_from, keys_from = slot * C * K, main * C * K
    g = tl.cumsum(tl.load(ell_p + row + rC), 0)
    eg = tl.exp(g)[:, None]
    df = tl.load(df_p + at)
    if OUTER:
        df = (scale * df.to(tl.float32)).to(TYPE)
    ds = _dot(tl.load(q_p + q_from + turned), (eg * df.to(tl.float32)).to(TYPE), PRECISION)
    tl.store(ds_p + slot * K * K + square, ds.to(TYPE))
    q, keys, u = tl.load(q_p + q_from + tile), tl.load(keys_p + keys_from + tile), tl.load(u_p + main * C * K + tile)
    dA = _dot(df, tl.trans(u), PRECISION) * _decay(g, g)
    dA = tl.where(rC[:, None] >= rC[None, :], -dA, 0.0).to(TYPE)
    dq = eg * _dot(df, tl.trans(tl.load(start_p + main * K * K + square)), PRECISION)
    o = tl.sum(q.to(tl.float32) * dq, 1)
    dq = _add_dot(dA, keys, dq, PRECISION)
    w = tl.load(w_p + ((m % heads) * N + N - 1) * K * K + square)
    dq = _add_dot(df, tl.trans(w), dq, PRECISION)
    if OUTER:
        tl.store(dq_p + at, (dq * _slope(tl.load(other_p + here).to(tl.float32))).to(TYPE))
        tl.store(copy_p + at, q)
    else:
        tl.store(dq_p + at, (dq + tl.load(other_p + at).to(tl.float32)).to(TYPE))
    upper = rC[:, None] <= rC[None, :]
    decay = tl.where(upper, -tl.exp(tl.minimum(g[None, :] - g[:, None], 0.0)), 0.0)
    dAt = _dot(u, tl.trans(df), PRECISION) * decay
    At = _dot(keys, tl.trans(q), PRECISION)
    W = dAt * At  # once, by rows and by columns: pairs that cancel do so exactly
    o += tl.sum(W, 0) - tl.sum(W, 1)
    tl.store(o_p + slot * C + rC, o)
    tl.store(dkeys_p + here, _dot(dAt.to(TYPE), q, PRECISION).to(TYPE))
    tl.store(du_p + here, _dot((At * decay).to(TYPE), df, PRECISION).to(TYPE))


@triton.jit(do_not_specialize=["n", "place", "rows", "chunks", "heads"])
def _systems(
    eta_p, ell_p, resets_p, last_p, keys_p, inverse_p, u_p, start_p, ds_p, read_du_p, read_dk_p, read_ds_p, read_o_p,
    g_p, dkeys_p, written_p, dell_p, n, place, rows, chunks, heads,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    OUTER: tl.constexpr, RESETS: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """One layer's system in one chunk and memory: G, the keys' adjoint, dS in place, what eta (written: dE u) and
    log alpha get. Of the main memory with what its reads gave."""
    m, box = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = m // heads
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    turned, pairs = rK[:, None] + rC[None, :] * K, rC[:, None] + rC[None, :] * C
    row, slot, read = (m * chunks + n) * C, (place * rows + m) * N + box, place * rows + m
    here, state = (m * N + box) * C * K + tile, (m * N + box) * K * K + square
    start = slot * K * K + square
    keys_from, inverse_from = row * K, row * C
    if OUTER:
        keys_from, inverse_from = slot * C * K, slot * C * C
    of_main = rC[:, None] * 0 + box == N - 1
    eta, ell = tl.load(eta_p + row + rC), tl.load(ell_p + row + rC)
    g, total = tl.cumsum(ell, 0), tl.sum(ell, 0)
    before, keep = tl.exp(g - ell), tl.exp(total)
    later = -tl.exp(total - g)
    if PARTIAL:  # the state after the chunk is the one before it
        live = tl.load(last_p + batch) != n
        later, keep = tl.where(live, later, 0.0), tl.where(live, keep, 1.0)
    if RESETS:  # no gradient reaches the document before
        fresh = (n + 1 < chunks) & (tl.load(resets_p + batch * chunks + tl.minimum(n + 1, chunks - 1)) != 0)
        later, keep = tl.where(fresh, 0.0, later), tl.where(fresh, 0.0, keep)
    # tiles are loaded again where they are used again: registers hold few of them
    after = tl.load(ds_p + state)
    through = tl.sum(tl.sum(after * tl.load(start_p + start).to(tl.float32), 1), 0)
    if PARTIAL:
        through = tl.where(live, through, 0.0)
    half = after.to(TYPE)
    keys = tl.load(keys_p + keys_from + tile)
    du = tl.load(read_du_p + read * C * K + tile, mask=of_main, other=0.0).to(tl.float32)
    du = _add_dot((later[:, None] * keys.to(tl.float32)).to(TYPE), half, du, PRECISION).to(TYPE)
    u = tl.load(u_p + slot * C * K + tile)
    dkeys = _dot((later[:, None] * u.to(tl.float32)).to(TYPE), tl.trans(half), PRECISION)
    kept = tl.sum(keys.to(tl.float32) * dkeys, 1)
    dE = _dot(tl.load(inverse_p + inverse_from + pairs), du, PRECISION)
    written = tl.sum(dE * u.to(tl.float32), 1)
    G = (eta[:, None] * dE).to(TYPE)
    tl.store(g_p + here, G)
    reads = before[:, None] * _dot(G, tl.trans(tl.load(start_p + start)), PRECISION)
    read_by = tl.sum(keys.to(tl.float32) * reads, 1)
    dkeys += reads
    if OUTER:
        dkeys += tl.load(read_dk_p + read * C * K + tile, mask=of_main, other=0.0).to(tl.float32)
    upper = -tl.exp(tl.minimum((g - ell)[None, :] - g[:, None], 0.0))
    upper = tl.where(rC[:, None] < rC[None, :], upper, 0.0)
    Y = _dot(u, tl.trans(G), PRECISION) * upper
    dkeys = _add_dot(Y.to(TYPE), keys, dkeys, PRECISION)
    W = Y * _dot(keys, tl.trans(keys), PRECISION)  # once, by rows and by columns: pairs that cancel do so exactly
    read_by += tl.sum(W, 0)
    by_column = tl.sum(W, 1)
    lower = tl.where(rC[:, None] > rC[None, :], -_decay(g - ell, g), 0.0)
    Y = _dot(G, tl.trans(u), PRECISION) * lower
    dkeys = _add_dot(Y.to(TYPE), keys, dkeys, PRECISION)
    tl.store(dkeys_p + here, dkeys.to(TYPE))
    # log alpha of t decays what was written before it, and scales what is read after it: by keys, pairs, outputs
    o = tl.load(read_o_p + read * C + rC, mask=rC * 0 + box == N - 1, other=0.0)
    dell = keep * through + tl.cumsum(kept, 0) - kept + tl.cumsum(read_by - by_column + o, 0, reverse=True) - read_by
    of_layer = ((m * N + box) * 2 + (0 if OUTER else 1)) * C + rC
    tl.store(written_p + of_layer, written)
    tl.store(dell_p + of_layer, dell)
    ds = keep * tl.load(ds_p + state)
    ds += tl.load(read_ds_p + read * K * K + square, mask=rK[:, None] * 0 + box == N - 1, other=0.0).to(tl.float32)
    ds = _add_dot(tl.load(keys_p + keys_from + turned), (before[:, None] * G.to(tl.float32)).to(TYPE), ds, PRECISION)
    tl.debug_barrier()  # all threads have read it
    tl.store(ds_p + state, ds)


@triton.jit
def _accumulate(value, state_p, initial_p, at):
    """What W = W_0 + S gets goes to both."""
    tl.store(state_p + at, tl.load(state_p + at) + value)
    tl.store(initial_p + at, tl.load(initial_p + at) + value)


@triton.jit(do_not_specialize=["n", "place", "rows", "chunks", "heads"])
def _errors(
    k_p, v_p, ak_p, av_p, dh_p, e0_p, m_p, x1_p, norm_p, w1_p, w2_p, start1_p, start2_p, g1_p, g2_p, dx1_p, dki_p,
    dm_p, dk_p, dv_p, ds1_p, ds2_p, dw1_p, dw2_p, n, place, rows, chunks, heads, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From G of both layers to W1, W2, k and v, in one chunk and memory."""
    m, box = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    turned = rK[:, None] + rC[None, :] * K
    row, slot = (m * chunks + n) * C, (place * rows + m) * N + box
    there, here = slot * C * K + tile, (m * N + box) * C * K + tile
    weight, state = ((m % heads) * N + box) * K * K + square, (m * N + box) * K * K + square
    W = _weight(w1_p, weight, start1_p, slot * K * K + square, TYPE)
    norm = tl.load(norm_p + slot * C + rC)[:, None]
    g1 = tl.load(g1_p + here).to(tl.float32)
    e0 = tl.load(e0_p + there)
    along = tl.sum(g1 * e0.to(tl.float32), 1)
    dm = (tl.load(g2_p + here).to(tl.float32) * _slope(tl.load(ak_p + there).to(tl.float32))).to(TYPE)
    tl.store(dm_p + here, dm)
    de0 = _add_dot(dm, W, norm * g1, PRECISION)
    dadded = (scale * scale * de0).to(TYPE)
    ddh = _dot(dadded, tl.trans(W), PRECISION)
    de0 = scale * de0
    dav = (-ddh * _slope(tl.load(av_p + there).to(tl.float32))).to(TYPE)
    W = _weight(w2_p, weight, start2_p, slot * K * K + square, TYPE)
    tl.store(dv_p + here, (_dot(dav, tl.trans(W), PRECISION) - de0).to(TYPE))
    of_w = _dot(tl.load(v_p + row * K + turned), dav, PRECISION)
    x1, dx1 = tl.load(x1_p + there).to(tl.float32), tl.load(dx1_p + here).to(tl.float32) / norm
    dhidden = ddh + dx1 + x1 * (along - tl.sum(x1 * dx1, 1))[:, None]
    a = tl.load(ak_p + there).to(tl.float32)
    gate = _gate(a)
    curved = gate * (1.0 - gate) * (2.0 + a * (1.0 - 2.0 * gate))
    curved *= tl.load(g2_p + here).to(tl.float32) * tl.load(m_p + there).to(tl.float32)
    dak = (dhidden * (gate * (1.0 + a * (1.0 - gate))) + curved).to(TYPE)
    dk = de0 + tl.load(dki_p + here).to(tl.float32)
    tl.store(dk_p + here, _add_dot(dak, tl.trans(W), dk, PRECISION).to(TYPE))
    of_w = _add_dot(tl.load(k_p + row * K + turned), dak, of_w, PRECISION)
    _accumulate(of_w, ds2_p, dw2_p, state)
    tl.debug_barrier()  # dm was stored by other threads
    of_w = _dot(tl.load(dh_p + slot * C * K + turned), dadded, PRECISION)
    of_w = _add_dot(tl.load(dm_p + (m * N + box) * C * K + turned), tl.load(e0_p + there), of_w, PRECISION)
    _accumulate(of_w, ds1_p, dw1_p, state)


@triton.jit
def _hidden_backward(
    dhidden, a, x_p, w, dx_p, ds2_p, dw2_p, x_from, dx_at, state,
    K: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From silu(x W2) to x and W2."""
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    da = (dhidden * _slope(a)).to(TYPE)
    tl.store(dx_p + dx_at, _dot(da, tl.trans(w), PRECISION).to(TYPE))
    of_w = _dot(tl.load(x_p + x_from + rK[:, None] + rC[None, :] * K), da, PRECISION)
    _accumulate(of_w, ds2_p, dw2_p, state)


@triton.jit(do_not_specialize=["n", "place", "rows", "chunks", "heads"])
def _keys(
    x_p, w1_p, w2_p, start1_p, start2_p, hx_p, dx_p, ds1_p, ds2_p, dw1_p, dw2_p,
    k_p, v_p, rk_p, rv_p, dk_p, dv_p, read_dk_p, dak_p, dav_p, n, place, rows, chunks, heads, scale,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """The adjoint of k = unit(a_k + c M_k(x)) and of v. A program per sequence, head and one of the two."""
    m, box = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    row, slot = (m * chunks + n) * C, (place * rows + m) * N + box
    at, own = row * K + tile, (m * BOXES + box) * C * K
    weight, state = ((m % heads) * N + box) * K * K + square, (m * N + box) * K * K + square
    of_memories = m * N * C * K + tile
    if box == 0:
        dy = tl.load(read_dk_p + (place * rows + m) * C * K + tile).to(tl.float32)
        for i in tl.static_range(N):
            dy += tl.load(dk_p + of_memories + i * C * K).to(tl.float32)
        y = tl.load(k_p + at).to(tl.float32)
        dz = tl.load(rk_p + row + rC)[:, None] * (dy - y * tl.sum(y * dy, 1)[:, None])
        tl.store(dak_p + at, dz.to(TYPE))
    else:
        dy = tl.load(dv_p + of_memories).to(tl.float32)
        for i in tl.static_range(1, N):
            dy += tl.load(dv_p + of_memories + i * C * K).to(tl.float32)
        y = tl.load(v_p + at).to(tl.float32)
        dz = tl.load(rv_p + row + rC)[:, None] * (dy - y * tl.sum(y * dy, 1)[:, None])
        tl.store(dav_p + at, dz.to(TYPE))
    dz = (scale * dz).to(TYPE)
    w = _weight(w2_p, weight, start2_p, slot * K * K + square, TYPE)
    a = _dot(tl.load(x_p + at), w, PRECISION)
    tl.store(hx_p + own + tile, (a * _gate(a)).to(TYPE))
    dhidden = _dot(dz, tl.trans(_weight(w1_p, weight, start1_p, slot * K * K + square, TYPE)), PRECISION)
    dx_at = ((m * BOXES + box) * chunks + n) * C * K + tile
    _hidden_backward(dhidden, a, x_p, w, dx_p, ds2_p, dw2_p, row * K, dx_at, state, K, C, TYPE, PRECISION)
    tl.debug_barrier()  # hx was stored by other threads
    _accumulate(_dot(tl.load(hx_p + own + rK[:, None] + rC[None, :] * K), dz, PRECISION), ds1_p, dw1_p, state)


@triton.jit(do_not_specialize=["n", "place", "rows", "chunks", "heads"])
def _gates(
    x_p, w1_p, w2_p, start1_p, start2_p, hx_p, dx_p, ds1_p, ds2_p, dw1_p, dw2_p,
    eta_p, ell_p, written_p, dell_p, ro_p, dge_p, dga_p, dro_p, n, place, rows, chunks, heads, eta_max,
    K: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    """The adjoint of eta and of log alpha. A program per sequence, head and one of the two. W1 is read along one
    direction w only, so that it needs no products: what it gets is of rank one."""
    m, gate = tl.program_id(0).to(tl.int64), tl.program_id(1)
    box = gate + 2
    rK, rC = tl.arange(0, K), tl.arange(0, C)
    square, tile = rK[:, None] * K + rK[None, :], rC[:, None] * K + rK[None, :]
    row, slot = (m * chunks + n) * C, (place * rows + m) * N + box
    weight, state = ((m % heads) * N + box) * K * K + square, (m * N + box) * K * K + square
    terms = m * N * 2 * C + rC
    if gate == 0:
        dlogit = tl.load(written_p + terms)
        for i in tl.static_range(1, 2 * N):
            dlogit += tl.load(written_p + terms + i * C)
        dlogit *= 1.0 - tl.load(eta_p + row + rC) / eta_max
        tl.store(dge_p + row + rC, dlogit)
    else:
        dlogit = tl.load(dell_p + terms)
        for i in tl.static_range(1, 2 * N):
            dlogit += tl.load(dell_p + terms + i * C)
        dlogit *= 1.0 - tl.exp(tl.load(ell_p + row + rC))
        tl.store(dga_p + row + rC, dlogit)
    w = _weight(w2_p, weight, start2_p, slot * K * K + square, TYPE)
    a = _dot(tl.load(x_p + row * K + tile), w, PRECISION)
    direction = tl.load(ro_p + ((m % heads) * 2 + gate) * K + rK)
    w1 = tl.load(w1_p + weight).to(tl.float32) + tl.load(start1_p + slot * K * K + square).to(tl.float32)
    through = tl.sum(w1 * direction[None, :], 1)
    dthrough = tl.sum(a * _gate(a) * dlogit[:, None], 0)
    own = dro_p + (m * 2 + gate) * K + rK
    tl.store(own, tl.load(own) + tl.sum(w1 * dthrough[:, None], 0))
    dx_at = ((m * BOXES + box) * chunks + n) * C * K + tile
    dhidden = dlogit[:, None] * through[None, :]
    _hidden_backward(dhidden, a, x_p, w, dx_p, ds2_p, dw2_p, row * K, dx_at, state, K, C, TYPE, PRECISION)
    _accumulate(dthrough[:, None] * direction[None, :], ds1_p, dw1_p, state)
