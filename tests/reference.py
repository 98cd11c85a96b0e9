"""The referee of the model: self-modifying Titans token by token, written from Eq. 83-91 and nothing else.

Every memory is a matrix (or two) of its own, updated once per token; no shared factors, no triangular systems, no
chunk algebra. Slow on purpose. Runs in the dtype of its inputs (float64 in the tests) and is differentiable.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.memory.scan import GATE_SCALE
from hope.mixers.self_modifying import SelfModifyingTitans


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def conv(weight: Tensor, x: Tensor) -> Tensor:
    """One sequence [T, D] through a causal depthwise convolution, one token and one tap at a time."""
    taps, rows = weight.shape[1], []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[0])
        for lag in range(taps):
            if t - lag >= 0:
                total = total + weight[:, taps - 1 - lag] * x[t - lag]
        rows.append(F.silu(total))
    return torch.stack(rows)


class HeadMemories:
    """All memories of one head of one sequence: name -> (weights, momenta), each a list of matrices."""

    def __init__(self, mixer: SelfModifyingTitans, head: int) -> None:
        self.config = mixer.config
        initial = mixer.memories.initial
        self.boxes = (*mixer.boxes, "main")
        if self.config.memory == "matrix":
            self.now = {b: [initial[b][head]] for b in self.boxes}
        else:
            self.now = {b: [initial[f"{b}_w1"][head], initial[f"{b}_w2"][head]] for b in self.boxes}
        self.initial = {b: list(ws) for b, ws in self.now.items()}
        self.momenta = {b: [torch.zeros_like(w) for w in ws] for b, ws in self.now.items()}

    def contribution(self, weights: list[Tensor], z: Tensor) -> Tensor:
        if self.config.memory == "matrix":
            return weights[0] @ z
        return weights[0] @ F.silu(weights[1] @ z)

    def objective_read(self, weights: list[Tensor], z: Tensor) -> Tensor:
        """M(z) of the inner objective: matrix memories read it unscaled, mlp memories scaled."""
        scale = 1.0 if self.config.memory == "matrix" else self.config.contribution
        return z + scale * self.contribution(weights, z)

    def gradients(self, start: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
        """d/dW of 1/2 |M(k) - v_hat|^2 (+ 1/2 |M(k)|^2) with v_hat constant, at the chunk's start state."""
        error = self.objective_read(start, k) - self.objective_read(start, v)
        if self.config.erase == "objective":
            error = error + self.objective_read(start, k)
        if self.config.memory == "matrix":
            return [torch.outer(error, k)]
        error = self.config.contribution * error
        before = start[1] @ k
        gate = torch.sigmoid(before)
        slope = gate * (1 + before * (1 - gate))
        return [torch.outer(error, F.silu(before)), torch.outer(slope * (start[0].T @ error), k)]

    def erase_keys(self, start: list[Tensor], k: Tensor) -> list[Tensor | None]:
        rule = self.config.erase
        along_k = k if rule in ("layerwise", "input") else None
        if self.config.memory == "matrix":
            return [along_k]
        hidden = unit(F.silu(start[1] @ k)) if rule == "layerwise" else None
        return [hidden, along_k]

    def write(
        self, box: str, start: list[Tensor], k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, zeta: Tensor
    ) -> None:
        """zeta: the rate of erasing."""
        updated = []
        grads, keys = self.gradients(start, k, v), self.erase_keys(start, k)
        for i, (w, g, key) in enumerate(zip(self.now[box], grads, keys, strict=True)):
            s = self.config.momentum * self.momenta[box][i] - eta * g
            self.momenta[box][i] = s
            kept = torch.zeros_like(w) if self.config.forget == "zero" else self.initial[box][i]
            fades = w - kept
            erased = 0.0 if key is None else zeta * torch.outer(fades @ key, key)
            updated.append(kept + alpha * fades - erased + s)
        self.now[box] = updated


def one_head(
    mixer: SelfModifyingTitans, head: int, x: Tensor, q: Tensor, projected: list[Tensor]
) -> tuple[Tensor, HeadMemories]:
    """x, q and the projected static paths of k and v [T, K] of one sequence -> y [T, K] before norm and gate, and the
    memories at the end."""
    config, memories = mixer.config, HeadMemories(mixer, head)
    c, out = config.contribution, []
    start = {}
    for t in range(x.shape[0]):
        for box in memories.boxes:
            if t % (config.main_chunk if box == "main" else config.projection_chunk) == 0:
                start[box] = list(memories.now[box])
        read = lambda box, z: c * memories.contribution(start[box], z) if box in memories.boxes else 0 * z
        if config.static == "learned":
            static_k, static_v = mixer.static_k[head] @ x[t], mixer.static_v[head] @ x[t]
        elif config.static == "projected":
            static_k, static_v = (s[t] for s in projected)
        else:
            static_k = static_v = x[t] if config.static == "identity" else 0 * x[t]
        k, v = unit(static_k + read("k", x[t])), static_v + read("v", x[t])
        v = unit(v) if config.normalise_values else v
        query = unit(q[t] + read("q", x[t])) if config.adaptive_query else q[t]
        gate = lambda w, b, box: GATE_SCALE * (w[head] @ (x[t] + read(box, x[t]))) + b[head]
        eta = config.eta_bound * torch.sigmoid(gate(mixer.eta_weight, mixer.eta_bias, "eta"))
        alpha = torch.sigmoid(gate(mixer.alpha_weight, mixer.alpha_bias, "alpha"))
        zeta = eta
        if config.erase_max is not None:
            logit = GATE_SCALE * mixer.erase_weight[head] @ x[t] + mixer.erase_bias[head]
            zeta = alpha * config.erase_max * torch.sigmoid(logit)
        for box in memories.boxes:
            memories.write(box, start[box], k, v, eta, alpha, zeta)
        weights = memories.now["main"] if config.read == "causal" else start["main"]
        y = memories.contribution(weights, query)
        out.append(y if config.memory == "matrix" else query + c * y)
    return torch.stack(out), memories


def one_document(mixer: SelfModifyingTitans, x_TD: Tensor) -> Tensor:
    """The whole mixer on one document [T, D] -> [T, D]."""
    heads, width = mixer.heads, mixer.head_dim
    streams = ["input", "query", *(["key", "value"] if mixer.config.static == "projected" else [])]
    weights = [(getattr(mixer, name).weight, getattr(mixer, f"conv_{name}").weight) for name in streams]
    xs, qs, *projected = (conv(taps, x_TD @ weight.T) for weight, taps in weights)
    outs = []
    for head in range(heads):
        cut = slice(head * width, (head + 1) * width)
        y, _ = one_head(mixer, head, unit(xs[:, cut]), unit(qs[:, cut]), [unit(s[:, cut]) for s in projected])
        outs.append(y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * mixer.norm.weight)
    gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[mixer.config.output_gate]
    return (torch.cat(outs, -1) * gate(x_TD @ mixer.gate.weight.T)) @ mixer.output.weight.T


def mixer_reference(mixer: SelfModifyingTitans, x_TBD: Tensor) -> Tensor:
    return torch.stack([one_document(mixer, x_TBD[:, b]) for b in range(x_TBD.shape[1])], 1)
