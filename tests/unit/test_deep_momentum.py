"""The deep memory of DMGD, its options and its limits (hope-math invariants 15-17 and 20)."""

from itertools import pairwise

import pytest
import torch
from optims import with_dmgd

from hope.optim import coordinate_memory as memory
from hope.optim import kernels, rules
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.rules import UpdateRule
from hope.optim.segments import Piece, Segments

MLP = with_dmgd(memory="mlp", mlp_lr=0.2, lr=0.02, eps=1e-4)
OPTIONS = [
    MLP,
    with_dmgd(MLP, mlp_key="gradient"),
    with_dmgd(MLP, objective="dot", preconditioner="none", output="rms_clip"),
    with_dmgd(MLP, normalise="value", erase=0.5, bias_correction=False),
    with_dmgd(MLP, memory="linear", output="rms_clip", output_bound=1.0),
    with_dmgd(MLP, output="rms_match"),
    with_dmgd(MLP, output="rms_match", mlp_key="gradient", objective="dot", preconditioner="none"),
]


def problem(dtype=torch.float64) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    shapes = [(6, 5), (4, 9), (7,)]
    return [torch.nn.Parameter(draw(*shape)) for shape in shapes], [draw(*shape) for shape in shapes]


def follow(config: OptimConfig, steps: int = 20, dtype=torch.float64) -> tuple[list[torch.Tensor], Dmgd]:
    """Noisy descent on a quartic; the last tensor is one-dimensional."""
    params, targets = problem(dtype)
    optimizer = Dmgd([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "vectors": True}], config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, t in zip(params, targets, strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=dtype)
            p.grad = 4 * (p.detach() - t) ** 3 + noise
        optimizer.step()
    return [p.detach().clone() for p in params], optimizer


def flat_follow(config: OptimConfig, ranks: int, steps: int = 20, dtype=torch.float64) -> list[torch.Tensor]:
    """The same descent with both matrices in one flat buffer with padding, cut into `ranks` uneven partitions.

    The ranks take turns in one process: their sums are recorded in a first pass over copies, and added up for the
    second, as an all-reduce would.
    """
    (a, b, c), targets = problem(dtype)
    whole = torch.cat([a.detach().reshape(-1), b.detach().reshape(-1), torch.zeros(6, dtype=dtype)])
    cuts = [round(len(whole) * (i / ranks) ** 1.5) for i in range(ranks + 1)]
    masters = [torch.nn.Parameter(whole[x:y].clone()) for x, y in pairwise(cuts)]
    vector = torch.nn.Parameter(c.detach().clone())
    optimizers = []
    for master, x, y in zip(masters, cuts, cuts[1:], strict=False):
        optimizer = Dmgd([{"params": [master], "weight_decay": 0.1}], config)
        bounds = [(0, 0, 30), (1, 30, 66)]
        pieces = [Piece(t, max(lo, x) - x, min(hi, y) - max(lo, x)) for t, lo, hi in bounds if max(lo, x) < min(hi, y)]
        optimizer.segments[master] = Segments(2, tuple(pieces))
        optimizers.append(optimizer)
    alone = Dmgd([{"params": [vector], "vectors": True}], config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        now = torch.cat([m.detach() for m in masters])
        grads = []
        for value, t in zip((now[:30].view(6, 5), now[30:66].view(4, 9), vector.detach()), targets, strict=True):
            noise = torch.randn(t.shape, generator=generator, dtype=dtype)
            grads.append((4 * (value - t) ** 3 + noise).reshape(-1))
        flat = torch.cat([*grads[:2], torch.zeros(6, dtype=dtype)])
        vector.grad = grads[2]
        alone.step()
        together(optimizers, masters, [flat[x:y] for x, y in pairwise(cuts)])
    now = torch.cat([m.detach() for m in masters])
    assert not now[66:].any()  # padding never moves
    return [now[:30].view(6, 5), now[30:66].view(4, 9), vector.detach()]


def together(optimizers: list[Dmgd], masters: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    class Recorded(Exception):
        pass

    parts = []

    def record(part):
        parts.append(part.clone())
        raise Recorded

    for optimizer, master, gradient in zip(optimizers, masters, gradients, strict=True):
        master.grad, optimizer.tensor_sums = gradient.clone(), record
        clocks = [(g["clock"], g["updates"]) for g in optimizer.param_groups]
        try:
            optimizer.step()
        except Recorded:
            for group, (clock, updates) in zip(optimizer.param_groups, clocks, strict=True):
                group["clock"], group["updates"] = clock, updates
    for optimizer, master, gradient in zip(optimizers, masters, gradients, strict=True):
        master.grad = gradient.clone()
        optimizer._completed = False
        optimizer.tensor_sums = lambda part: torch.stack(parts).sum(0)
        optimizer.step()


@pytest.mark.parametrize("config", OPTIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_uneven_partitions_and_padding_do_not_matter(config, ranks):
    reference, _ = follow(config)
    for a, b in zip(flat_follow(config, ranks), reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ranks", [2, 4])
def test_partitions_agree_in_single_precision(ranks):
    one, many = flat_follow(MLP, 1, dtype=torch.float32), flat_follow(MLP, ranks, dtype=torch.float32)
    for a, b in zip(many, one, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_network_that_does_not_learn_is_no_network():
    """mlp_lr 0: the last layer stays zero, and the result is AdamW's, bit for bit."""
    plain, _ = follow(OptimConfig(lr=0.02, eps=1e-4))
    deep, _ = follow(with_dmgd(MLP, mlp_lr=0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, deep, strict=True))


def test_a_network_that_learns_makes_a_difference_to_matrices_only():
    plain, _ = follow(OptimConfig(lr=0.02, eps=1e-4))
    deep, optimizer = follow(MLP)
    assert [bool(torch.equal(a, b)) for a, b in zip(plain, deep, strict=True)] == [False, False, True]
    keys = [set(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    assert keys == [{"memory", "square", "mlp", "mean_square"}] * 2 + [{"memory", "square"}]


def test_the_inner_gradient_is_autograds():
    """Of the l2 and the dot loss by the network's weights, against torch."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(memory.size(3, 8), generator=generator, dtype=torch.float64).requires_grad_()
    *keys, held, value = torch.randn(5, 40, generator=generator, dtype=torch.float64).unbind()
    y = memory.read(weights, tuple(keys), 8)
    l2, dot = (lambda y: held + y - value), (lambda y: -value)
    each = [torch.autograd.grad(one, weights, retain_graph=True)[0].square().sum() for one in y]
    for loss, error in (((held + y - value).square().sum() / 2, l2), (-(y * value).sum(), dot)):
        [expected] = torch.autograd.grad(loss, weights, retain_graph=True)
        found = memory.read_and_gradient(weights.detach(), tuple(keys), 8, error)
        torch.testing.assert_close(found, torch.cat([sum(each)[None], expected]))


def test_the_network_learns_what_the_linear_memory_leaves():
    """A gradient that flips its sign every step: the moving average cannot follow, a memory keyed by it can."""
    p = torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.float64))
    base = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = Dmgd([{"params": [p]}], with_dmgd(MLP, mlp_lr=0.5, lr=0.0))
    optimizer.watch(True)
    relative = []
    for step in range(200):
        p.grad = base * (-1) ** step
        optimizer.step()
        _, _, _, square, before, after = optimizer.measured[p].sum(0).tolist()
        relative.append((before / square, after / square))
    assert relative[1][0] > 0.45  # 1/2 is no memory at all
    assert relative[-1][0] < 0.05
    assert relative[5][1] < relative[5][0]  # a write lowers the loss at its own key


def test_the_output_is_bounded_by_the_gradients_rms():
    p = torch.nn.Parameter(torch.zeros(100, 10))
    config = with_dmgd(objective="dot", preconditioner="none", output="rms_clip", output_bound=2.0, lr=1.0)
    optimizer = Dmgd([{"params": [p]}], config)
    p.grad = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    p.grad[0, 0] = 1000.0
    rms = p.grad.square().mean().sqrt()
    optimizer.step()
    assert p.detach().abs().max() == pytest.approx(2 * rms.item(), rel=1e-6)


def test_zero_erase_rate_is_preconditioned_momentum():
    """Invariant 20; and with a rate, a coordinate forgets the more, the larger its gradient is."""
    config = with_dmgd(normalise="value", bias_correction=False, lr=0.02)
    zero, _ = follow(with_dmgd(config, erase=0.0))
    p = [t.detach().clone() for t in problem()[0]]
    m, v = [torch.zeros_like(t) for t in p], [torch.zeros_like(t) for t in p]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for i, t in enumerate(problem()[1]):
            g = 4 * (p[i] - t) ** 3 + torch.randn(t.shape, generator=generator, dtype=torch.float64)
            v[i] = 0.95 * v[i] + 0.05 * g * g
            m[i] = 0.9 * m[i] + 0.1 * g / (v[i].sqrt() + 1e-8)  # Eq. 47
            p[i] = p[i] * (1 - 0.02 * 0.1 * (i < 2)) - 0.02 * m[i]
    for a, b in zip(zero, p, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    q = torch.nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    eraser = Dmgd([{"params": [q]}], with_dmgd(objective="dot", preconditioner="none", erase=1.0))
    for gradient in ([1.0, 1.0], [0.0, 3.0]):
        q.grad = torch.tensor([gradient], dtype=torch.float64)
        eraser.step()
    square = 0.9 * 1.0 + 0.1 * 4.5  # of the tensor's gradient
    x = 9 / square
    first = 1.0  # 0 x 0.9 + 1
    expected = torch.tensor([[0.9 * first, (0.9 - x / (1 + x)) * first + 3]], dtype=torch.float64)
    torch.testing.assert_close(eraser.state[q]["memory"], expected)


def test_the_literal_equation_50_diverges():
    """Invariant 17: m_j(u_j) = m_j u_j with value 1 moves every coordinate by -lr u_j^2, uphill where u_j < 0.

    Kept so that nobody introduces it again. DMGD descends from the same point with either memory.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    w, m = start.clone(), torch.zeros_like(start)
    loss = lambda w: w.square().sum().item() / 2
    for _ in range(200):
        u = w  # the gradient of 1/2 |W|^2
        m = 0.9 * m - 0.05 * u  # grad of <m(u), 1> = sum_j m_j u_j
        w = w + m * u
    assert not loss(w) < 1e3 * loss(start)
    for kind in ("linear", "mlp"):
        p = torch.nn.Parameter(start.clone())
        sgd = with_dmgd(memory=kind, objective="dot", preconditioner="none", lr=0.05)
        optimizer = Dmgd([{"params": [p]}], sgd)
        for _ in range(200):
            p.grad = p.detach().clone()
            optimizer.step()
        assert loss(p.detach()) < 1e-3 * loss(start), kind


def test_no_stretch_is_longer_than_a_chunk(monkeypatch):
    """No temporary exceeds the chunk: every element-wise call sees at most that many elements, and all of them."""
    seen = []
    update = rules.update
    monkeypatch.setattr(rules, "update", lambda rule, x, *rest: (seen.append(x.p.numel()), update(rule, x, *rest)))
    monkeypatch.setitem(kernels.CHUNK, "cpu", 1000)
    for kind in ("linear", "mlp"):
        p = torch.nn.Parameter(torch.zeros(70, 60))
        p.grad = torch.ones(70, 60)
        Dmgd([{"params": [p]}], with_dmgd(memory=kind)).step()
        assert sum(seen) == 4200
        assert max(seen) <= 1000
        seen.clear()
    assert max(kernels.CHUNK.values()) * MLP.dmgd.mlp.width <= 64 * 1024**2


def test_settings_that_contradict_each_other_are_refused():
    assert [p[0] for p in with_dmgd(erase=0.1).problems()] == ["optim.dmgd.erase"]
    assert UpdateRule.of(MLP).features == 3


def test_a_level_with_a_clock_teaches_its_network_only_when_due():
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Dmgd([{"params": [p], "period": 3}], with_dmgd(MLP, mlp_lr=1.0))
    generator = torch.Generator().manual_seed(0)
    nets = []
    for _ in range(9):
        p.grad = torch.randn(8, 8, generator=generator)
        optimizer.step()
        nets.append(optimizer.state[p]["mlp"].clone() if "mlp" in optimizer.state[p] else None)
    assert nets[:2] == [None, None]
    moved = [not torch.equal(a, b) for a, b in pairwise(nets[2:])]
    assert moved == [False, False, True, False, False, True]


def rms_of_steps(config: OptimConfig, steps: int = 60) -> float:
    """The rms of a tensor's last update in units of the learning rate; gradients are noise with a small mean."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
    optimizer = Dmgd([{"params": [weight]}], config)
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(30, 20, generator=generator, dtype=torch.float64) + 0.05
        optimizer.step()
    return ((weight.detach() - before) / config.lr).square().mean().sqrt().item()


@pytest.mark.parametrize("key", ["memory", "gradient"])
def test_rms_match_gives_the_step_the_length_of_the_linear_memorys(key):
    linear = rms_of_steps(with_dmgd(MLP, memory="linear"))
    free = rms_of_steps(with_dmgd(MLP, mlp_key=key))
    matched = rms_of_steps(with_dmgd(MLP, mlp_key=key, output="rms_match"))
    assert abs(free / linear - 1) > 0.25  # a network that predicts noise takes the step back
    assert matched == pytest.approx(linear, rel=0.2)  # of the memory before the write: a step behind


def test_rms_match_needs_a_network():
    assert [path for path, _, _ in with_dmgd(output="rms_match").problems()] == ["optim.dmgd.output"]
    assert not list(with_dmgd(output="rms_match", memory="mlp").problems())
