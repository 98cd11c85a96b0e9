"""Mamba-2 token by token, as the paper prints it: one state [P, N] per head, no chunks. Slow on purpose, and
differentiable, in the dtype of its inputs.
"""

import itertools

import torch
from linear_reference import silu
from torch import Tensor


def convolution(conv, x: Tensor) -> Tensor:
    """One document [T, C] through the taps of each channel, the newest last."""
    taps = conv.weight.shape[1]
    rows = []
    for t in range(x.shape[0]):
        row = conv.bias
        for lag in range(min(taps, t + 1)):
            row = row + conv.weight[:, taps - 1 - lag] * x[t - lag]
        rows.append(row)
    return silu(torch.stack(rows))


def layer_of_a_document(layer, z: Tensor) -> Tensor:
    """The mixer on one document [T, D]."""
    config, P = layer.config, layer.head_dim
    N, groups, heads = config.state, config.groups, layer.skip.shape[0]
    x, B, C = (
        convolution(getattr(layer, f"conv_{name}"), z @ getattr(layer, name).weight.T)
        for name in ("value", "key", "query")
    )
    gate = silu(z @ layer.gate.weight.T)
    heads_of_a_group, outputs = heads // groups, []
    for h in range(heads):
        g, A = h // heads_of_a_group, -torch.exp(layer.decay_rate[h])
        state, rows = z.new_zeros(P, N), []
        for t in range(z.shape[0]):
            dt = torch.log(1 + torch.exp(layer.step_weight[h] @ z[t] + layer.step_bias[h]))
            x_t, B_t, C_t = x[t, h * P : (h + 1) * P], B[t, g * N : (g + 1) * N], C[t, g * N : (g + 1) * N]
            state = torch.exp(A * dt) * state + torch.outer(dt * x_t, B_t)
            rows.append(state @ C_t + layer.skip[h] * x_t)
        outputs.append(torch.stack(rows))
    y = torch.cat(outputs, -1) * gate
    parts = []
    for g in range(groups):
        part = y[:, g * heads_of_a_group * P : (g + 1) * heads_of_a_group * P]
        parts.append(part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    return (torch.cat(parts, -1) * layer.norm_weight) @ layer.output.weight.T


def layer_by_tokens(layer, x_TBD: Tensor, starts_TB: Tensor | None = None) -> Tensor:
    """The mixer on rows of packed documents."""
    rows = []
    for b in range(x_TBD.shape[1]):
        bounds = [] if starts_TB is None else starts_TB[:, b].nonzero().flatten().tolist()
        bounds = sorted({0, *bounds, x_TBD.shape[0]})
        rows.append(torch.cat([layer_of_a_document(layer, x_TBD[a:e, b]) for a, e in itertools.pairwise(bounds)]))
    return torch.stack(rows, 1)
