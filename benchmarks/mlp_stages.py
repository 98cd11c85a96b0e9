"""Every stage of the loop of `mlp` memories as formulas of plain tensors, for `hope.memory.two_layer.loop`.

In float64 they are what the kernels are compared with, stage by stage, and together the loop's whole adjoint without
autograd. Names and shapes are those of the loop's table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hope.memory.two_layer.loop import READ_BOXES, Rule, Table

EPSILON = 1e-6


def slope(a: Tensor) -> Tensor:
    """silu'(a)."""
    gate = torch.sigmoid(a)
    return gate * (1 + a * (1 - gate))


def curvature(a: Tensor) -> Tensor:
    """silu''(a)."""
    gate = torch.sigmoid(a)
    return gate * (1 - gate) * (2 + a * (1 - 2 * gate))


def silu(a: Tensor) -> Tensor:
    return a * torch.sigmoid(a)


def decay(end: Tensor, start: Tensor, diagonal: int) -> Tensor:
    """e^{end_t - start_s} for s up to t + diagonal, else 0."""
    return torch.tril(torch.exp(torch.tril(end.unsqueeze(-1) - start.unsqueeze(-2))), diagonal)


def column(rows: Tensor) -> Tensor:
    return rows.unsqueeze(-1)


class Formulas:
    """`hope.memory.two_layer.loop.Stages`."""

    def project(self, t: Table, rule: Rule, n: int, place: int) -> None:
        part = slice(n * rule.chunk, (n + 1) * rule.chunk)
        x, c = t["x"][:, part], rule.contribution
        w1, w2 = self._layers(t)
        hidden = [silu(x @ w2[:, box]) for box in range(READ_BOXES)]
        for box, (key, scale) in enumerate((("k", "rk"), ("v", "rv"))):
            z = t[f"a_{key}"][:, part] + c * (hidden[box] @ w1[:, box])
            t[scale][:, part] = torch.rsqrt(z.square().sum(-1) + EPSILON)
            t[key][:, part] = z * column(t[scale][:, part])
        read_out = self._per_row(t, "read_out")
        logits = [
            t[name][:, part] + (hidden[2 + i] * (w1[:, 2 + i] @ column(read_out[:, i])).mT).sum(-1)
            for i, name in enumerate(("g_eta", "g_alpha"))
        ]
        real = self._valid(t, part)
        eta, ell = rule.eta_max * torch.sigmoid(logits[0]) * real, torch.nn.functional.logsigmoid(logits[1]) * real
        t["eta"][:, part], t["ell"][:, part] = eta, ell
        k = t["k"][:, part]
        t["inverse"][:, part] = self._inverse(k, eta, ell)

    def write(self, t: Table, rule: Rule, n: int, place: int) -> None:
        part, c = slice(n * rule.chunk, (n + 1) * rule.chunk), rule.contribution
        k, v = (t[name][:, None, part] for name in ("k", "v"))
        eta, ell = (t[name][:, None, part] for name in ("eta", "ell"))
        g = ell.cumsum(-1)
        before, p, keep = column((g - ell).exp()), column((g[..., -1:] - g).exp()), g[..., -1, None, None].exp()
        w1, w2 = self._layers(t)
        ak, av = k @ w2, v @ w2
        hk, dh = silu(ak), silu(ak) - silu(av)
        norm = (hk.square().sum(-1) + EPSILON).sqrt()
        x1 = hk / column(norm)
        e0 = c * (k - v) + c * c * (dh @ w1)
        m = e0 @ w1.mT
        inverse1 = self._inverse(x1, eta, ell)
        u1 = inverse1 @ (column(eta) * (e0 * column(norm) + before * (x1 @ t["s1"])))
        u2 = t["inverse"][:, None, part] @ (column(eta) * (m * slope(ak) + before * (k @ t["s2"])))
        found = {"ak": ak, "av": av, "dh": dh, "e0": e0, "m": m, "inverse1": inverse1, "u1": u1, "u2": u2, "x1": x1}
        found |= {"norm": norm, "start1": t["s1"], "start2": t["s2"]}
        for name, value in found.items():
            if name in t:
                t[name][place] = value[:, -t[name].shape[2] :]
        live, fresh = self._live(t, n), self._fresh(t, rule, n + 1)
        for layer, keys, u in (("s1", x1, u1), ("s2", k, u2)):
            after = torch.where(live, keep * t[layer] - keys.mT @ (p * u), t[layer])
            t[layer] = after.masked_fill(fresh, 0.0)

    def read_inner(self, t: Table, rule: Rule, first: int, count: int) -> None:
        for place, part in self._chunks(rule, first, count):
            state, u = t["start2"][place][:, -1], t["u2"][place][:, -1]
            w = self._per_row(t, "w2")[:, -1]
            t["bq"][place] = self._read(t["q"][:, part], t["k"][:, part], u, t["ell"][:, part], state, w)
            t["hq"][place] = silu(t["bq"][place])

    def read_outer(self, t: Table, rule: Rule, first: int, count: int) -> None:
        for place, part in self._chunks(rule, first, count):
            state, u, keys = (t[name][place][:, -1] for name in ("start1", "u1", "x1"))
            w = self._per_row(t, "w1")[:, -1]
            added = self._read(t["hq"][place], keys, u, t["ell"][:, part], state, w)
            t["y"][:, part] = t["q"][:, part] + rule.contribution * added

    def outer_read_backward(self, t: Table, rule: Rule, first: int, count: int) -> None:
        for place, part in self._chunks(rule, first, count):
            state, u, keys = (t[name][place][:, -1] for name in ("start1", "u1", "x1"))
            df = rule.contribution * t["dy"][:, part]
            dhq, *rest = self._read_backward(df, t["hq"][place], keys, u, t["ell"][:, part], state, self._main(t, "w1"))
            for name, value in zip(("read_dx1", "read_du1", "read_ds1", "read_o1"), rest, strict=True):
                t[name][place] = value
            t["db_all"][:, part] = dhq * slope(t["bq"][place])
            t["hq_all"][:, part] = t["hq"][place]

    def inner_read_backward(self, t: Table, rule: Rule, first: int, count: int) -> None:
        for place, part in self._chunks(rule, first, count):
            state, u = t["start2"][place][:, -1], t["u2"][place][:, -1]
            q, k, ell, db = (t[name][:, part] for name in ("q", "k", "ell", "db_all"))
            dq, *rest = self._read_backward(db, q, k, u, ell, state, self._main(t, "w2"))
            for name, value in zip(("read_dk", "read_du2", "read_ds2", "read_o2"), rest, strict=True):
                t[name][place] = value
            t["dq"][:, part] = dq + t["dy"][:, part]

    def systems_backward(self, t: Table, rule: Rule, n: int, place: int) -> None:
        """Of u = X eta R with R = e + e^{g-} x S, and of S' = keep S - x^T (p u): G = eta dE = dR, adjoints of keys, of
        S but for what W = W_0 + S adds, of g (as dell) and of eta (written: dE u)."""
        part = slice(n * rule.chunk, (n + 1) * rule.chunk)
        eta, ell = t["eta"][:, None, part], t["ell"][:, None, part]
        g = ell.cumsum(-1)
        before, p, keep = column((g - ell).exp()), column((g[..., -1:] - g).exp()), g[..., -1, None, None].exp()
        live, fresh = self._live(t, n), self._fresh(t, rule, n + 1)
        for layer, keys, inverse in (
            ("1", t["x1"][place], t["inverse1"][place]),
            ("2", t["k"][:, None, part], t["inverse"][:, None, part]),
        ):
            after = t[f"ds{layer}"].masked_fill(fresh, 0.0)
            seen, kept = torch.where(live, after, torch.zeros_like(after)), torch.where(live, keep, 1.0)
            u, start = t[f"u{layer}"][place], t[f"start{layer}"][place]
            du = -(p * keys) @ seen
            du[:, -1] += t[f"read_du{layer}"][place]
            dE = inverse.mT @ du
            G = column(eta) * dE
            stays = -p * (u @ seen.mT)
            reads = before * (G @ start.mT)
            Y = -(G @ u.mT) * decay(g - ell, g, -1)
            W = Y * (keys @ keys.mT)
            dkeys = stays + reads + (Y + Y.mT) @ keys
            by_kept, by_read = (keys * stays).sum(-1), (keys * reads).sum(-1)
            through = kept[..., 0] * (seen * start).sum((-1, -2)).unsqueeze(-1)
            later = -W.sum(-2)
            later[:, -1] += t[f"read_o{layer}"][place]
            dbefore = by_read + W.sum(-1)
            after_t = (later + dbefore).flip(-1).cumsum(-1).flip(-1) - dbefore
            t["written"][:, :, int(layer) - 1] = (dE * u).sum(-1)
            t["dell"][:, :, int(layer) - 1] = through + by_kept.cumsum(-1) - by_kept + after_t
            dstart = kept * after + keys.mT @ (before * G)
            dstart[:, -1] += t[f"read_ds{layer}"][place]
            t[f"g{layer}"][:], t["dx1" if layer == "1" else "dk_inner"][:], t[f"ds{layer}"][:] = G, dkeys, dstart
        t["dx1"][:, -1] += t["read_dx1"][place]

    def errors_backward(self, t: Table, rule: Rule, n: int, place: int) -> None:
        """Of errors and hidden vectors: dk and dv per memory, and what W = W_0 + S gets."""
        part, c = slice(n * rule.chunk, (n + 1) * rule.chunk), rule.contribution
        k, v = (t[name][:, None, part] for name in ("k", "v"))
        ak, av, dh, e0, m, x1 = (t[name][place] for name in ("ak", "av", "dh", "e0", "m", "x1"))
        norm, w1, w2 = column(t["norm"][place]), *self._layers(t, place)
        g1, g2, dx1 = t["g1"], t["g2"], t["dx1"]
        dm = g2 * slope(ak)
        de0 = norm * g1 + dm @ w1
        dadded = c * c * de0
        ddh = dadded @ w1.mT
        along = (g1 * e0).sum(-1, keepdim=True) - (dx1 * x1).sum(-1, keepdim=True) / norm
        dak = (dx1 / norm + x1 * along + ddh) * slope(ak) + g2 * m * curvature(ak)
        dav = -ddh * slope(av)
        t["dm"][:] = dm
        t["dk"][:] = t["dk_inner"] + c * de0 + dak @ w2.mT
        t["dv"][:] = dav @ w2.mT - c * de0
        self._of_layers(t, slice(None), dm.mT @ e0 + dh.mT @ dadded, k.mT @ dak + v.mT @ dav)

    def project_backward(self, t: Table, rule: Rule, n: int, place: int) -> None:
        part, c = slice(n * rule.chunk, (n + 1) * rule.chunk), rule.contribution
        x, eta, ell = (t[name][:, part] for name in ("x", "eta", "ell"))
        w1, w2 = self._layers(t, place)
        dk, dv = t["dk"].sum(1) + t["read_dk"][place], t["dv"].sum(1)
        through_unit = lambda y, dy, scale: column(scale) * (dy - y * (y * dy).sum(-1, keepdim=True))
        dz = [through_unit(t["k"][:, part], dk, t["rk"][:, part]), through_unit(t["v"][:, part], dv, t["rv"][:, part])]
        t["da_k"][:, part], t["da_v"][:, part] = dz
        dlogits = [
            t["written"].sum((1, 2)) * (1 - eta / rule.eta_max),
            t["dell"].sum((1, 2)) * (1 - ell.exp()),
        ]
        t["dg_eta"][:, part], t["dg_alpha"][:, part] = dlogits
        read_out = self._per_row(t, "read_out")
        for box in range(READ_BOXES):
            a = x @ w2[:, box]
            hidden = silu(a)
            if box < 2:
                t["hx"][:, box] = hidden
                dhidden, of_w1 = c * dz[box] @ w1[:, box].mT, hidden.mT @ (c * dz[box])
            else:
                weight = column(read_out[:, box - 2])
                dhidden = column(dlogits[box - 2]) * (w1[:, box] @ weight).mT
                dproduct = hidden.mT @ column(dlogits[box - 2])  # of W1^T w, [M, F, 1]
                of_w1 = dproduct @ weight.mT
                t["dread_out"][:, box - 2] += (w1[:, box].mT @ dproduct).squeeze(-1)
            da = dhidden * slope(a)
            t["dx_of"][:, box, part] = da @ w2[:, box].mT
            self._of_layers(t, slice(box, box + 1), of_w1.unsqueeze(1), (x.mT @ da).unsqueeze(1))

    @staticmethod
    def _of_layers(t: Table, boxes: slice, of_w1: Tensor, of_w2: Tensor) -> None:
        for name, value in (("1", of_w1), ("2", of_w2)):
            t[f"ds{name}"][:, boxes] += value
            t[f"dw{name}"][:, boxes] += value

    @staticmethod
    def _per_row(t: Table, name: str) -> Tensor:
        """Of every head -> of every sequence and head."""
        return t[name].repeat(t["x"].shape[0] // t[name].shape[0], *[1] * (t[name].ndim - 1))

    def _main(self, t: Table, name: str) -> Tensor:
        return self._per_row(t, name)[:, -1]

    def _layers(self, t: Table, place: int | None = None) -> tuple[Tensor, Tensor]:
        """W1^T and W2^T now, or at the start of a chunk of the group."""
        now = (t["s1"], t["s2"]) if place is None else (t["start1"][place], t["start2"][place])
        return self._per_row(t, "w1") + now[0], self._per_row(t, "w2") + now[1]

    @staticmethod
    def _chunks(rule: Rule, first: int, count: int) -> list[tuple[int, slice]]:
        """Place in the group and tokens of every chunk."""
        return [(i, slice((first + i) * rule.chunk, (first + i + 1) * rule.chunk)) for i in range(count)]

    @staticmethod
    def _inverse(keys: Tensor, eta: Tensor, ell: Tensor) -> Tensor:
        g = ell.cumsum(-1)
        T = column(eta) * decay(g - ell, g, -1) * (keys @ keys.mT)
        eye = torch.eye(keys.shape[-2], dtype=keys.dtype, device=keys.device)
        return torch.linalg.solve_triangular(T + eye, eye.expand_as(T), upper=False, unitriangular=True)

    @staticmethod
    def _read(q: Tensor, keys: Tensor, u: Tensor, ell: Tensor, state: Tensor, w: Tensor) -> Tensor:
        g = ell.cumsum(-1)
        return column(g.exp()) * (q @ state) + q @ w - (decay(g, g, 0) * (q @ keys.mT)) @ u

    @staticmethod
    def _read_backward(df: Tensor, q: Tensor, keys: Tensor, u: Tensor, ell: Tensor, state: Tensor, w: Tensor):  # type: ignore[no-untyped-def]
        """dq, dkeys, du, dS and the part o of what g gets, of `_read`."""
        g = ell.cumsum(-1)
        lower, eg = decay(g, g, 0), column(g.exp())
        scores = q @ keys.mT
        dA = -lower * (df @ u.mT)
        W, through = dA * scores, eg * (df @ state.mT)
        dq = through + df @ w.mT + dA @ keys
        o = (q * through).sum(-1) + W.sum(-1) - W.sum(-2)
        return dq, dA.mT @ q, -(lower * scores).mT @ df, q.mT @ (eg * df), o

    @staticmethod
    def _valid(t: Table, part: slice) -> Tensor:
        if "valid" not in t:
            return torch.ones_like(t["g_eta"][:, part])
        return t["valid"][:, part].repeat_interleave(t["x"].shape[0] // t["valid"].shape[0], 0)

    @staticmethod
    def _marks(t: Table, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(t["x"].shape[0] // rows.shape[0]).view(-1, 1, 1, 1)

    def _live(self, t: Table, n: int) -> Tensor:
        """Whether what chunk n writes is kept."""
        if "last" not in t:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=t["x"].device)
        return self._marks(t, t["last"] != n)

    def _fresh(self, t: Table, rule: Rule, n: int) -> Tensor:
        """Whether chunk n begins a document."""
        if "resets" not in t or n >= t["x"].shape[1] // rule.chunk:
            return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=t["x"].device)
        return self._marks(t, t["resets"][:, n] != 0)
