"""Every stage of the memory's kernels against float64, from what the kernels themselves stored: which one is wrong.

Used by benchmarks/memory_kernels.py. Names are those of hope/memory/fused.py. All tensors are [B, H, ...] of one chunk,
or of one of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Say = Callable[..., None]
PER_TOKEN = ("x", "q", "a_k", "a_v", "g_eta", "g_alpha")


class Run(NamedTuple):
    """One pass: what `fused.forward` was given (by name), made and `fused.backward` made, with df, dend and marks."""

    given: dict[str, Tensor]
    made: dict[str, Tensor]
    adjoint: dict[str, Tensor]
    df: Tensor
    dend: Tensor
    valid: Tensor | None
    resets: Tensor | None
    last: Tensor | None
    chunk: int
    block: int
    eta_max: float

    @property
    def blocks(self) -> int:
        """Of a chunk."""
        return self.chunk // self.block


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are zero."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def unit(z: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6)
    return z * inverse, inverse.squeeze(-1)


def decay(end: Tensor, start: Tensor, diagonal: int) -> Tensor:
    return torch.tril(torch.exp(torch.tril(end.unsqueeze(-1) - start.unsqueeze(-2))), diagonal)


def system(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, ell: Tensor, S: Tensor, live: Tensor) -> dict[str, Tensor]:
    """(I + T)^-1, E, u, f and S after the chunk, from its keys, values and gates."""
    g = ell.cumsum(-1)
    before, d, total = g - ell, k - v, g[..., -1:]
    T = eta.unsqueeze(-1) * decay(before, g, -1) * (k @ k.mT)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    X = torch.linalg.solve_triangular(T + eye, eye.expand_as(T), upper=False, unitriangular=True)
    E = eta.unsqueeze(-1) * (d + (before.exp().unsqueeze(-1) * k + d) @ S)
    u = X @ E
    f = g.exp().unsqueeze(-1) * (q @ S) - (decay(g, g, 0) * (q @ k.mT)) @ u
    end = total.unsqueeze(-1).exp() * S - k.mT @ ((total - g).exp().unsqueeze(-1) * u)
    return {"X": X, "E": E, "u": u, "f": f, "end": torch.where(live, end, S)}


def step(given: dict[str, Tensor], S: Tensor, valid: Tensor, live: Tensor, eta_max: float) -> dict[str, Tensor]:
    """One chunk from its inputs; every intermediate by name."""
    r = given["x"] @ S
    k, rk = unit(given["a_k"] + r @ given["b_k"].mT)
    v, rv = unit(given["a_v"] + r @ given["b_v"].mT)
    along = lambda e: (r * e.unsqueeze(-2)).sum(-1)
    eta = eta_max * torch.sigmoid(given["g_eta"] + along(given["e_eta"])) * valid
    ell = F.logsigmoid(given["g_alpha"] + along(given["e_alpha"])) * valid
    rest = system(given["q"], k, v, eta, ell, S, live)
    return {"r": r, "k": k, "v": v, "rk": rk, "rv": rv, "eta": eta, "ell": ell, **rest}


def check_chunk(run: Run, n: int, say: Say) -> None:
    """Say the error of every tensor of chunk n, a line per stage. Of a chunk in blocks, all but what lies between
    kernels is compared with the formulas of the whole chunk."""
    chunks, first, following_first = run.df.shape[2] // run.chunk, n * run.blocks, (n + 1) * run.blocks
    part = slice(n * run.chunk, (n + 1) * run.chunk)
    cut = lambda table, *names: [table[name][:, :, part].double() for name in names]
    batch = run.df.shape[0]
    marks = lambda t: t.view(batch, 1, 1, 1).bool()
    valid = torch.ones_like(run.df[:, :, part, 0].double()) if run.valid is None else run.valid[:, None, part].double()
    everywhere = torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=run.df.device)
    live = everywhere if run.last is None else marks(run.last != n)
    reset = lambda i: ~everywhere if run.resets is None else marks(run.resets[:, i])
    S = run.made["states"][:, :, first].double()
    inputs = {name: t[:, :, part] if name in PER_TOKEN else t for name, t in run.given.items()}
    inputs = {name: t.double().detach().clone().requires_grad_() for name, t in inputs.items()}
    S_in = S.clone().requires_grad_()
    found = step(inputs, S_in, valid, live, run.eta_max)
    names = ("k", "v", "rk", "rv", "eta", "ell")
    errors = {name: relative(made, found[name]) for name, made in zip(names, cut(run.made, *names), strict=True)}
    say(f"chunk {n} forward: keys, gates", **errors)
    k, v, u, X, eta, ell = cut(run.made, "k", "v", "u", "inverse", "eta", "ell")
    q, (df,) = inputs["q"].detach(), cut({"df": run.df}, "df")
    own = system(q, k, v, eta, ell, S, live)
    g = ell.cumsum(-1)
    eg, p = g.exp().unsqueeze(-1), (g[..., -1:] - g).exp().unsqueeze(-1)
    A = decay(g, g, 0) * (q @ k.mT)
    end = g[..., -1:].unsqueeze(-1).exp() * S - k.mT @ (p * u)
    following = torch.where(live, end, S)
    after = run.made["end"] if n + 1 == chunks else run.made["states"][:, :, following_first]
    if n + 1 < chunks:
        following = following.masked_fill(reset(n + 1), 0.0)
    inside = X.unflatten(2, (run.blocks, run.block))  # blocks on the diagonal are the inverses of those on it
    diagonal = own["X"].unflatten(2, (run.blocks, -1)).unflatten(-1, (run.blocks, -1)).diagonal(dim1=2, dim2=4)
    expected_u = X @ own["E"] if run.blocks == 1 else own["u"]
    say(f"chunk {n} forward: system", inverse=relative(inside, diagonal.movedim(-1, 2)), u=relative(u, expected_u),
        S=relative(after, following), f=relative(run.made["f"][:, :, part], eg * (q @ S) - A @ u))  # fmt: skip
    for place, tiles in enumerate(zip(*(t.split(run.block, 2) for t in (q, k, v, u, X, df, ell)), strict=True)):
        check_outputs_backward(run, first + place, say, *tiles)
    outer = run.dend if n + 1 == chunks else run.adjoint["trace"][:, :, following_first]
    wanted = [inputs[name] for name in ("a_k", "a_v", "g_eta", "g_alpha")] + [found["r"], S_in]
    loss = (found["f"] * df).sum() + (found["end"] * outer.double()).sum()
    gradients = torch.autograd.grad(loss, wanted)
    names = ("dzk", "dzv", "dle", "dla", "dr")
    errors = {m: relative(t, e) for m, t, e in zip(names, cut(run.adjoint, *names), gradients[:5], strict=True)}
    dS = gradients[5].masked_fill(reset(n), 0.0)
    say(f"chunk {n} backward: sequential", **errors, dS=relative(run.adjoint["trace"][:, :, first], dS))


def check_outputs_backward(
    run: Run, n: int, say: Say,
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, X: Tensor, df: Tensor, ell: Tensor,
) -> None:  # fmt: skip
    """The stage that is parallel over blocks, from the tensors of block n in float64."""
    part, S = slice(n * run.block, (n + 1) * run.block), run.made["states"][:, :, n].double()
    g = ell.cumsum(-1)
    eg, p, before = g.exp().unsqueeze(-1), (g[..., -1:] - g).exp().unsqueeze(-1), (g - ell).exp().unsqueeze(-1)
    lower = decay(g, g, 0)
    A, dA = lower * (q @ k.mT), -lower * (df @ u.mT)
    through = eg * (df @ S.mT)
    W = dA * (q @ k.mT)
    expected = {
        "dq": through + dA @ k,
        "dko": dA.mT @ q,
        "deo": X.mT @ (-A.mT @ df),
        "kp": -X.mT @ (p * k),
        "h": before * k + k - v if run.blocks == 1 else before * k,
        "o": (q * through).sum(-1) + W.sum(-1) - W.sum(-2),
    }
    errors = {name: relative(run.adjoint[name][:, :, part], e) for name, e in expected.items()}
    say(f"block {n} backward: outputs", **errors, dso=relative(run.adjoint["dso"][:, :, n], (eg * q).mT @ df))


def not_finite(run: Run) -> Iterator[str]:
    """Names of tensors with something that is no number."""
    for name, t in {**run.made, **run.adjoint}.items():
        if not torch.isfinite(t).all():
            yield name
