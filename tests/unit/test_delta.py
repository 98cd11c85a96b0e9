"""The gated-delta chunk against published special cases, in float64 (hope-math invariants 3-8)."""

import pytest
import torch
from torch.nn import functional as F

from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaChunk, DeltaState, Gates
from hope.memory.mlp import MlpMemories
from hope.parameters import initialise

D = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def gates(length: int, seed: int = 5) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    eta = torch.rand(length, generator=generator, dtype=D) * 0.5
    alpha = 0.5 + 0.5 * torch.rand(length, generator=generator, dtype=D)
    return Gates(eta, alpha.log())


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(state, keys, errors, gate, queries=None, **kw):
    """The chunk's end state, and the causal reads if queries are given."""
    written = DeltaChunk(keys, gate, **kw).write(DeltaState(state), keys @ state.mT, errors)
    return written.state.weight, None if queries is None else written.read(queries, queries @ state.mT)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5, 24])
def test_chunk_equals_loop(length, erase, momentum):
    """Invariant 1: frozen errors, any chunk length; states and every read inside the chunk."""
    k, e, q, state, gate = (
        random(length, 4),
        random(length, 3, seed=1),
        random(length, 4, seed=2),
        random(3, 4),
        gates(length),
    )
    w, s, reads = state, torch.zeros_like(state), []
    for t in range(length):
        s = momentum * s - gate.eta[t] * torch.outer(e[t], k[t])
        erased = gate.eta[t] * torch.outer(w @ k[t], k[t]) if erase else 0.0
        w = gate.log_alpha[t].exp() * w - erased + s
        reads.append(w @ q[t])
    end, fast_reads = run(state, k, e, gate, q, erase=erase, momentum=momentum)
    assert_close(end, w)
    assert_close(fast_reads, torch.stack(reads))


def test_padding_changes_nothing():
    k, e, state, gate = random(5, 4), random(5, 3, seed=1), random(3, 4), gates(5)
    real = torch.tensor([1.0, 1, 0, 1, 0], dtype=D)
    padded = Gates(gate.eta * real, gate.log_alpha * real, real)
    keep = real.bool()
    short = Gates(gate.eta[keep], gate.log_alpha[keep])
    for momentum in (0.0, 0.8):
        assert_close(
            run(state, k, e, padded, momentum=momentum)[0], run(state, k[keep], e[keep], short, momentum=momentum)[0]
        )


@pytest.mark.parametrize("forget", ["initial", "zero"])
def test_mlp_gradients_are_the_autograd_gradients(forget):
    """Invariant 3: closed forms equal autograd of 1/2 |M(k) - stopgrad M(v)|^2 for both layers."""
    config = MemoryConfig(memory="mlp", forget=forget, contribution=0.7, erase="none", expansion=2)
    memories = MlpMemories(("main",), 1, 4, config).double()
    initialise(memories, 0)
    w1, w2 = (memories.initial[f"main_{w}"].detach().requires_grad_() for w in ("w1", "w2"))
    k, v = random(4), random(4, seed=1)
    read = lambda z: z + 0.7 * (w1[0] @ F.silu(w2[0] @ z))
    (0.5 * (read(k) - read(v).detach()).square().sum()).backward()
    eta = 0.25
    bank = memories.bank(("main",), D)
    gate = Gates(torch.full((1, 1, 1), eta, dtype=D), torch.zeros(1, 1, 1, dtype=D))
    after, _ = bank.write(bank.start(1), k.view(1, 1, 1, 4), v.view(1, 1, 1, 4), gate)
    outer, inner = bank.layers(after)
    assert_close(outer[0, 0, 0], w1[0] - eta * w1.grad[0])
    assert_close(inner[0, 0], w2[0] - eta * w2.grad[0])


def test_dot_objective_is_the_gated_delta_rule():
    """Invariant 4: error -v gives M_t = M_{t-1}(alpha I - eta k k^T) + eta v k^T; alpha = 1 is DeltaNet."""
    k, v, state = random(6, 4), random(6, 3, seed=1), random(3, 4)
    for gate in (gates(6), Gates(gates(6).eta, torch.zeros(6, dtype=D))):
        m = state
        for t in range(6):
            beta = gate.eta[t] / gate.log_alpha[t].exp()
            m = gate.log_alpha[t].exp() * (m - beta * torch.outer(m @ k[t], k[t])) + gate.eta[t] * torch.outer(
                v[t], k[t]
            )
        assert_close(run(state, k, -v, gate)[0], m)


def test_no_erase_is_linear_attention_and_retention():
    """Invariant 4: alpha = 1 gives sum eta v k^T; alpha < 1 gives decayed (retentive) linear attention."""
    k, v, gate = random(6, 4), random(6, 3, seed=1), gates(6)
    still = Gates(gate.eta, torch.zeros(6, dtype=D))
    assert_close(run(torch.zeros(3, 4, dtype=D), k, -v, still, erase=False)[0], (gate.eta[:, None] * v).T @ k)
    decay = torch.tensor([gate.log_alpha[t + 1 :].sum().exp() for t in range(6)], dtype=D)
    assert_close(run(torch.zeros(3, 4, dtype=D), k, -v, gate, erase=False)[0], ((decay * gate.eta)[:, None] * v).T @ k)


def test_l2_objective_with_chunks_of_one_erases_twice():
    """Invariant 5: M (alpha I - 2 eta k k^T) + eta v k^T."""
    k, v, m, gate = random(6, 4), random(6, 3, seed=1), random(3, 4), gates(6)
    expected = m
    for t in range(6):
        eta, alpha, kk = gate.eta[t], gate.log_alpha[t].exp(), torch.outer(k[t], k[t])
        expected = expected @ (alpha * torch.eye(4, dtype=D) - 2 * eta * kk) + eta * torch.outer(v[t], k[t])
        one = Gates(gate.eta[t : t + 1], gate.log_alpha[t : t + 1])
        m = run(m, k[t : t + 1], k[t : t + 1] @ m.mT - v[t : t + 1], one)[0]
    assert_close(m, expected)


def test_momentum_without_erase_is_titans():
    """Invariant 6: M_t = (1 - a) M_{t-1} + S_t, S_t = b S_{t-1} - theta grad (Titans Eq. 13-14), gradients frozen."""
    k, v, m, gate = random(7, 4), random(7, 3, seed=1), random(3, 4), gates(7)
    errors = k @ m.mT - v
    memory, surprise = m, torch.zeros_like(m)
    for t in range(7):
        surprise = 0.6 * surprise - gate.eta[t] * torch.outer(m @ k[t] - v[t], k[t])
        memory = gate.log_alpha[t].exp() * memory + surprise
    assert_close(run(m, k, errors, gate, erase=False, momentum=0.6)[0], memory)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_dgd_step_is_the_proximal_solution(scale):
    """Invariant 7: with eta' = eta / (1 + eta |x|^2) one write solves min 1/2 |W x - u|^2 + 1/(2 eta) |W - W_0|^2."""
    x, u, w0, eta = scale * random(4), random(3, seed=1), random(3, 4), 0.7
    exact = torch.linalg.solve(torch.outer(x, x) + torch.eye(4, dtype=D) / eta, (torch.outer(u, x) + w0 / eta).T).T
    rate = torch.full((1,), eta, dtype=D) / (1 + eta * x @ x)
    assert_close(run(w0, x[None], -u[None], Gates(rate, torch.zeros(1, dtype=D)))[0], exact)


def test_tiny_alpha_does_not_overflow():
    """Log-space ratios: 256 tokens of alpha = 1e-4 underflow Gamma to 0; outputs and gradients stay finite."""
    k = F.normalize(torch.randn(256, 8), dim=-1)
    log_alpha = torch.full((256,), 1e-4).log().requires_grad_()
    gate = Gates(torch.full((256,), 0.5), log_alpha)
    end, reads = run(torch.randn(8, 8), k, torch.randn(256, 8), gate, k)
    (end.sum() + reads.sum()).backward()
    assert torch.isfinite(end).all()
    assert torch.isfinite(reads).all()
    assert torch.isfinite(log_alpha.grad).all()


# (retention, write, erase) of published layers, as rows of one table: see hope.memory.delta.
FAMILY = {
    "linear attention": lambda alpha, beta: (1 + 0 * alpha, 1 + 0 * beta, 0 * beta),
    "retnet": lambda alpha, beta: (0 * alpha + 0.9, 1 + 0 * beta, 0 * beta),
    "mamba-2, scalar decay": lambda alpha, beta: (alpha, beta, 0 * beta),
    "deltanet": lambda alpha, beta: (1 + 0 * alpha, beta, beta),
    "gated deltanet": lambda alpha, beta: (alpha, beta, alpha * beta),
}


@pytest.mark.parametrize("name", list(FAMILY))
def test_the_linear_family_on_one_chunk_equals_its_token_loop(name):
    """48 tokens in chunks of 16, float64: reads, end states and gradients."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    k, q, v = torch.nn.functional.normalize(draw(2, 48, 8), dim=-1), draw(2, 48, 8), draw(2, 48, 6)
    alpha, beta = torch.sigmoid(draw(2, 48) + 2), torch.sigmoid(draw(2, 48))
    keep, write, erase = FAMILY[name](alpha, beta)
    inputs = [t.requires_grad_() for t in (k, q, v)]

    def loop():
        state, out = torch.zeros(2, 6, 8, dtype=torch.float64), []
        for t in range(48):
            kt = k[:, t, None, :]
            erased = erase[:, t, None, None] * (state @ kt.mT) @ kt
            state = keep[:, t, None, None] * state - erased + write[:, t, None, None] * v[:, t, :, None] @ kt
            out.append(state @ q[:, t, :, None])
        return torch.stack(out, 1).squeeze(-1), state

    def chunks():
        state, out = torch.zeros(2, 6, 8, dtype=torch.float64), []
        for first in range(0, 48, 16):
            cut = slice(first, first + 16)
            gates = Gates(write[:, cut], keep[:, cut].log(), erase=erase[:, cut])
            done = DeltaChunk(k[:, cut], gates).write(DeltaState(state), k[:, cut] @ state.mT, -v[:, cut])
            out.append(done.read(q[:, cut], q[:, cut] @ state.mT))
            state = done.state.weight
        return torch.cat(out, 1), state

    (slow, end), (fast, found) = loop(), chunks()
    assert (fast - slow).abs().max() <= 1e-13 * slow.abs().max()
    assert (found - end).abs().max() <= 1e-13 * end.abs().max()
    weights = torch.linspace(-1, 1, slow.numel(), dtype=torch.float64).view_as(slow)
    expected = torch.autograd.grad((slow * weights).sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad((fast * weights).sum(), inputs), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
