"""The linear family token by token, as the papers print it: one matrix per head, no chunks, no triangular systems.

Slow on purpose. Runs in the dtype of its inputs (float64 in the tests) and is differentiable.
"""

import itertools

import torch
from torch import Tensor


def one_head(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor | None, state: Tensor, erase: bool,
    starts: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k [T, K], v [T, V], log_decay [T, 1 or K], write [T], state S [K, V] (as printed) -> y [T, V] and S."""
    rows = []
    for t, begins in enumerate(starts):
        if begins:
            state = torch.zeros_like(state)
        decay = torch.ones_like(k[t]) if log_decay is None else log_decay[t].exp().expand_as(k[t])
        rate = 1.0 if write is None else write[t]
        state = torch.diag(decay) @ state
        if erase:  # S <- (I - b k k^T) Diag(a) S
            state = (torch.eye(len(decay), dtype=k.dtype) - rate * torch.outer(k[t], k[t])) @ state
        state = state + rate * torch.outer(k[t], v[t])
        rows.append(state.T @ q[t])
    return torch.stack(rows), state


def token_loop(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor | None, state: Tensor, *, erase: bool,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The arguments and results of `hope.memory.linear.linear_memory`; state [B, H, V, K]."""
    batch, heads, length, _ = q.shape
    ys, states = [], []
    for b in range(batch):
        number = [0] * length if segment is None else segment[b].tolist()
        starts = [now != before for now, before in zip(number, [0, *number[:-1]], strict=True)]
        for h in range(heads):
            pick = lambda t, b=b, h=h: None if t is None else t[b, h]
            y, end = one_head(*map(pick, (q, k, v, log_decay, write)), state[b, h].T, erase, starts)
            ys.append(y)
            states.append(end.T)
    return torch.stack(ys).unflatten(0, (batch, heads)), torch.stack(states).unflatten(0, (batch, heads))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convolution(weight: Tensor, x: Tensor) -> Tensor:
    """One document [T, D] through a causal depthwise convolution with silu."""
    taps = weight.shape[1]
    sums = [sum(weight[:, taps - 1 - lag] * x[t - lag] for lag in range(min(taps, t + 1))) for t in range(x.shape[0])]
    return silu(torch.stack(sums))


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions 0, 1, ... of [T, K]: feature i and i + K/2 are a complex number."""
    half = x.shape[1] // 2
    rate = base ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.exp(1j * torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1) * rate)
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def layer_of_a_document(layer, x: Tensor) -> Tensor:
    """The mixer `linear` on one document [T, D], head by head, from the table of rules."""
    rule, width = layer.rule, layer.head_dim
    heads = x.shape[1] // width
    z = {name: x @ getattr(layer, name).weight.T for name in ("query", "key", "value")}
    if rule.conv_width:
        z = {name: convolution(getattr(layer, f"conv_{name}").weight, value) for name, value in z.items()}
    ys = []
    for h in range(heads):
        q, k, v = (value[:, h * width : (h + 1) * width] for value in z.values())
        if rule.feature_map == "elu1":
            q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
        if rule.unit_keys:
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        if rule.rope_base:
            q, k = rotate(q, rule.rope_base), rotate(k, rule.rope_base)
        log_decay, write = gates(layer, x, h)
        state = x.new_zeros(width, width)
        y, _ = one_head(q, k, v, log_decay, write, state, rule.erase, [False] * x.shape[0])
        if rule.normaliser:
            ones = torch.ones_like(v[:, :1])
            weights, _ = one_head(q, k, ones, log_decay, write, state[:, :1], rule.erase, [False] * x.shape[0])
            y = y / (weights + 1e-6)
        if rule.skip:
            y = y + layer.skip[h] * v
        if rule.head_norm:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
        ys.append(y)
    y = torch.cat(ys, -1)
    if rule.gate != "none":
        gate = x @ layer.gate.weight.T
        y = y * (silu(gate) if rule.gate == "silu" else torch.sigmoid(gate))
    return y @ layer.output.weight.T


def gates(layer, x: Tensor, h: int) -> tuple[Tensor | None, Tensor | None]:
    """log a [T, 1 or K] and b [T] of a head."""
    rule, width = layer.rule, layer.head_dim
    log_decay = step = write = None
    if rule.decay == "constant":
        log_decay = torch.log(x.new_tensor(1 - 2.0 ** (-5 - h))).expand(x.shape[0], 1)
    elif rule.decay == "head":
        step = torch.log(1 + torch.exp(x @ layer.decay_weight[h] + layer.decay_bias[h]))
        log_decay = (-layer.decay_rate[h].exp() * step).unsqueeze(-1)
    elif rule.decay == "channel":
        rows = slice(h * width, (h + 1) * width)
        logit = x @ layer.decay_down.T @ layer.decay_up.weight[rows].T + layer.decay_bias[rows]
        log_decay = -layer.decay_rate[h].exp() * torch.log(1 + torch.exp(logit))
    if rule.write == "beta":
        write = layer.config.write_max * torch.sigmoid(x @ layer.write_weight[h])
    return log_decay, step if rule.write == "step" else write


def layer_by_tokens(layer, x_TBD: Tensor, starts_TB: Tensor | None = None) -> Tensor:
    """The mixer `linear` on rows of packed documents."""
    rows = []
    for b in range(x_TBD.shape[1]):
        bounds = [] if starts_TB is None else starts_TB[:, b].nonzero().flatten().tolist()
        bounds = sorted({0, *bounds, x_TBD.shape[0]})
        pieces = [layer_of_a_document(layer, x_TBD[a:e, b]) for a, e in itertools.pairwise(bounds)]
        rows.append(torch.cat(pieces))
    return torch.stack(rows, 1)
