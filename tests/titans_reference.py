"""Titans' memory and TTT token by token, as the papers print them: the inner gradient is autograd's, of the loss
1/2 |M(k) - v|^2 by the weights, and both recurrences are taken one token after the other. No chunk algebra, no closed
forms.

Slow on purpose. Runs in the dtype of its inputs (float64 in the tests) and is differentiable.
"""

import itertools
import math

import torch
from linear_reference import convolution, rotate, silu
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def network(weights: list[Tensor], z: Tensor, rule, norm: tuple[Tensor, Tensor] | None) -> Tensor:
    """M(z) of one head: weights [out, in], z [K]."""
    hidden = z
    for number, weight in enumerate(weights):
        if number:
            hidden = silu(hidden) if rule.activation == "silu" else gelu(hidden)
        hidden = weight @ hidden
    if norm is not None:
        scale, shift = norm
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-6).sqrt() * scale + shift
    return z + hidden if rule.residual else hidden


def one_head(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, keep: Tensor | None, eta: Tensor | None, weights: list[Tensor],
    rule, norm: tuple[Tensor, Tensor] | None, momenta: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """q, k, v [T, K], theta, 1 - alpha and eta [T] (None: 1 and 0) -> y [T, K], the weights and their momenta."""
    momenta, rows = momenta or [torch.zeros_like(w) for w in weights], []
    for t in range(q.shape[0]):
        if t % rule.chunk == 0:
            # copies: keys and values may come from these weights, and are constants of the inner gradient
            start = [w.clone() if w.requires_grad else w.clone().requires_grad_() for w in weights]
        with torch.enable_grad():
            loss = 0.5 * (network(start, k[t], rule, norm) - v[t]).square().sum()
            gradients = torch.autograd.grad(loss, start, create_graph=True)
        moved = [torch.zeros_like(s) if eta is None else eta[t] * s for s in momenta]
        momenta = [s - theta[t] * g for s, g in zip(moved, gradients, strict=True)]
        weights = [(w if keep is None else keep[t] * w) + s for w, s in zip(weights, momenta, strict=True)]
        rows.append(network(weights, q[t], rule, norm))
    return torch.stack(rows), weights, momenta


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def reads_of_a_document(memory, x: Tensor) -> list[Tensor]:
    """`LongTermMemory` on one document [T, D]: the reads [T, K] of every head."""
    rule, width = memory.rule, memory.head_dim
    z = {name: x @ getattr(memory, name).weight.T for name in ("query", "key", "value")}
    if rule.conv_width:
        z = {name: convolution(getattr(memory, f"conv_{name}").weight, value) for name, value in z.items()}
    rates, found = memory.rates, []
    for h in range(x.shape[1] // width):
        q, k, v = (value[:, h * width : (h + 1) * width] for value in z.values())
        if rule.unit_keys:
            q, k = unit(q), unit(k)
        gate = lambda name, h=h: torch.sigmoid(
            x @ getattr(rates, f"{name}_weight")[h] + getattr(rates, f"{name}_bias")[h]
        )
        theta = memory.config.theta_bound(width) * gate("theta")
        keep = 1 - gate("decay") if rule.decay else None
        eta = memory.config.momentum_max * gate("momentum") if rule.momentum else None
        norm = (memory.network.scale[h], memory.network.shift[h]) if rule.inner_norm else None
        weights = [layer[h] for layer in memory.network.layers]
        found.append(one_head(q, k, v, theta, keep, eta, weights, rule, norm)[0])
    return found


def head_norm(y: Tensor, weight: Tensor) -> Tensor:
    return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_of_a_document(layer, x: Tensor) -> Tensor:
    """The mixer `titans` on one document [T, D]."""
    y = torch.cat([head_norm(y, layer.norm.weight) for y in reads_of_a_document(layer.memory, x)], -1)
    if layer.rule.gate != "none":
        gate = x @ layer.gate.weight.T
        y = y * (silu(gate) if layer.rule.gate == "silu" else torch.sigmoid(gate))
    return y @ layer.output.weight.T


def attention_of_a_document(attention, x: Tensor) -> Tensor:
    """Windowed attention and persistent keys on one document [T, D], query by query, before the output map."""
    width, window, columns = attention.head_dim, attention.config.window, []
    for h in range(x.shape[1] // width):
        rows = slice(h * width, (h + 1) * width)
        q, k, v = (x @ getattr(attention, name).weight[rows].T for name in ("query", "key", "value"))
        turned, k = rotate(q, attention.config.rope_base), rotate(k, attention.config.rope_base)
        out = []
        for t in range(x.shape[0]):
            near = slice(max(0, t - window + 1), t + 1)
            scores, values = k[near] @ turned[t], v[near]
            if attention.persistent_keys is not None:  # they have no position
                scores = torch.cat([attention.persistent_keys[h] @ q[t], scores])
                values = torch.cat([attention.persistent_values[h], values])
            out.append(torch.softmax(scores / width**0.5, 0) @ values)
        columns.append(torch.stack(out))
    return torch.cat(columns, -1)


def gated_of_a_document(layer, x: Tensor) -> Tensor:
    """The mixer `titans_mag` on one document [T, D]."""
    width, columns = layer.memory.head_dim, []
    seen = attention_of_a_document(layer.attention, x)
    for h, read in enumerate(reads_of_a_document(layer.memory, x)):
        gate = head_norm(read, layer.norm_memory.weight)
        gate = torch.sigmoid(gate) if layer.kind == "sigmoid" else silu(gate)
        columns.append(gate * head_norm(seen[:, h * width : (h + 1) * width], layer.norm_attention.weight))
    return torch.cat(columns, -1) @ layer.attention.output.weight.T


def layered_of_a_document(layer, x: Tensor) -> Tensor:
    """The mixer `titans_mal` on one document [T, D]."""
    remembered = layer_of_a_document(layer.memory, x)
    normed = head_norm(x + remembered, layer.norm.weight)
    return remembered + attention_of_a_document(layer.attention, normed) @ layer.attention.output.weight.T


def context_of_a_document(layer, x: Tensor) -> Tensor:
    """The mixer `titans_mac` on one document [T, D], head by head and segment by segment."""
    rule, width, columns = layer.rule, layer.head_dim, []
    for h in range(x.shape[1] // width):
        z = {
            n: x @ getattr(layer, n).weight[h * width : (h + 1) * width].T for n in ("query", "key", "value", "recall")
        }
        norm = (layer.network.scale[h], layer.network.shift[h]) if rule.inner_norm else None
        weights, momenta, out = [w[h] for w in layer.network.layers], None, []
        for first in range(0, x.shape[0], layer.config.segment):
            q, k, v, r = (t[first : first + layer.config.segment] for t in z.values())
            recalled = torch.stack([network(weights, unit(each), rule, norm) for each in r])
            y = segment_attention(layer, h, q, k, v, recalled)
            gate = lambda name, y=y, h=h: torch.sigmoid(
                y @ getattr(layer.rates, f"{name}_weight")[h] + getattr(layer.rates, f"{name}_bias")[h]
            )
            theta = layer.config.theta_bound(width) * gate("theta")
            keep = 1 - gate("decay") if rule.decay else None
            eta = layer.config.momentum_max * gate("momentum") if rule.momentum else None
            asked, key, value = (y @ getattr(layer, f"memory_{n}")[h].T for n in ("query", "key", "value"))
            read, weights, momenta = one_head(
                unit(asked), unit(key), value, theta, keep, eta, weights, rule, norm, momenta
            )
            opened = head_norm(read, layer.norm_memory.weight)
            opened = torch.sigmoid(opened) if layer.config.gate == "sigmoid" else silu(opened)
            out.append(head_norm(y, layer.norm_attention.weight) * opened)
        columns.append(torch.cat(out))
    return torch.cat(columns, -1) @ layer.output.weight.T


def segment_attention(layer, h: int, q: Tensor, k: Tensor, v: Tensor, recalled: Tensor) -> Tensor:
    """Of one head and segment [C, K], query by query."""
    base, rows = layer.config.rope_base, []
    turned, keys, recalled_keys = (rotate(t, base) for t in (q, k, recalled @ layer.recalled_key[h].T))
    recalled_values = recalled @ layer.recalled_value[h].T
    for t in range(q.shape[0]):
        scores = [recalled_keys[: t + 1] @ turned[t], keys[: t + 1] @ turned[t]]
        values = [recalled_values[: t + 1], v[: t + 1]]
        if layer.persistent:
            scores.append(layer.persistent_keys[h] @ q[t])
            values.append(layer.persistent_values[h])
        rows.append(torch.softmax(torch.cat(scores) / q.shape[1] ** 0.5, 0) @ torch.cat(values))
    return torch.stack(rows)


def by_documents(function, x_TBD: Tensor, starts_TB: Tensor | None = None) -> Tensor:
    """A function of one document [T, D] on rows of packed documents."""
    rows = []
    for b in range(x_TBD.shape[1]):
        bounds = [] if starts_TB is None else starts_TB[:, b].nonzero().flatten().tolist()
        bounds = sorted({0, *bounds, x_TBD.shape[0]})
        rows.append(torch.cat([function(x_TBD[a:e, b]) for a, e in itertools.pairwise(bounds)]))
    return torch.stack(rows, 1)
