"""CMS levels in context token by token, as Eq. 71 and 72 say: at every token each level asks autograd for the gradient
of its loss 1/2 |M(k) - target|^2 at the weights of its chunk's start, and moves. No chunk algebra, no closed forms, no
differences from a start: whole weights, which forget towards where they began.

Slow on purpose. Runs in the dtype of its inputs (float64 in the tests) and is differentiable.
"""

import torch
from linear_reference import silu
from titans_reference import by_documents
from torch import Tensor


def mlp(weights: list[Tensor], u: Tensor) -> Tensor:
    """M(u) of one head: weights [F, K] and [K, F], u [K]."""
    return weights[1] @ silu(weights[0] @ u)


def gradients(weights: list[Tensor], key: Tensor, value: Tensor, own_target: bool) -> list[Tensor]:
    """Of 1/2 |M(key) - target|^2 by the weights; the target is value, or what M makes of it, and no part of what is
    differentiated."""
    leaves = [w.clone() if w.requires_grad else w.clone().requires_grad_() for w in weights]
    with torch.enable_grad():
        target = mlp(weights, value) if own_target else value
        loss = 0.5 * (mlp(leaves, key) - target).square().sum()
        return list(torch.autograd.grad(loss, leaves, create_graph=True))


def one_head(level, head: int, u: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Reads [T, K] of one head, and the weights of every level, fastest first, after the last token.

    u, v: what the head sees of every token, [T, K]; x: what the rates see, [T, D].
    """
    first = [level.first[head], level.second[head]]
    count, length = len(level.levels), u.shape[0]
    chunks = [section.chunk for section in level.levels]
    own_target, causal = level.section.objective == "target", level.section.read == "causal"
    began = [first for _ in range(count)]  # what each level forgets towards
    weights = [first for _ in range(count)]
    starts = [first for _ in range(count)]  # of each level's chunk
    rows = []
    for t in range(length):
        for n in reversed(range(count)):  # the slowest first: faster ones begin anew from it
            if t % chunks[n] == 0:
                if n + 1 < count and t % chunks[n + 1] == 0:
                    began[n] = weights[n] = weights[n + 1]
                starts[n] = weights[n]
        for n in range(count):
            section, rates = level.levels[n], level.rates[n]
            gate = lambda name, rates=rates, t=t: torch.sigmoid(
                x[t] @ getattr(rates, f"{name}_weight")[head] + getattr(rates, f"{name}_bias")[head]
            )
            theta = section.rate_bound() / u.shape[1] * gate("theta")
            keep = 1 - gate("decay") if section.forget_bias is not None else 1.0
            if own_target:
                steps = gradients(starts[n], u[t], v[t], True)
            elif t:
                steps = gradients(starts[n], u[t - 1], u[t], False)
            else:
                steps = [torch.zeros_like(w) for w in first]  # nothing comes before the first token
            weights[n] = [b + keep * (w - b) - theta * g for b, w, g in zip(began[n], weights[n], steps, strict=True)]
        rows.append(mlp(weights[0] if causal else starts[0], u[t]))
    return torch.stack(rows), weights


def rms(x: Tensor) -> Tensor:
    return x * x.shape[-1] ** 0.5 / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def level_of_a_document(level, x: Tensor) -> Tensor:
    """`InContextMlp` on one document [T, D]."""
    found, width = [], level.sizes.head_dim
    for head in range(level.sizes.heads):
        rows = slice(head * width, (head + 1) * width)
        u = rms(x @ level.input.weight[rows].T)
        v = rms(x @ level.target.weight[rows].T) if level.section.objective == "target" else u
        found.append(one_head(level, head, u, v, x)[0])
    return torch.cat(found, -1) @ level.output.weight.T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def swiglu(level, x: Tensor) -> Tensor:
    x = norm(x, level.norm.weight)
    return (silu(x @ level.mlp.gate.weight.T) * (x @ level.mlp.up.weight.T)) @ level.mlp.down.weight.T


def chain_of_rows(cms, x_TBD: Tensor, starts_TB: Tensor | None, independent: bool) -> Tensor:
    """All levels of a block's CMS, residuals included: one after the other, or side by side."""
    fast = [
        lambda x, own=level: by_documents(
            lambda d: level_of_a_document(own.mlp, norm(d, own.norm.weight)), x, starts_TB
        )
        for level in cms.in_context
    ]
    slow = [lambda x, own=level: swiglu(own, x) for level in cms.levels]
    if independent:
        return x_TBD + sum(w * f(x_TBD) for w, f in zip(cms.aggregate, [*fast, *slow], strict=True))
    for f in [*fast, *slow]:
        x_TBD = x_TBD + f(x_TBD)
    return x_TBD
