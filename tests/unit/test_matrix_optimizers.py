"""Muon and M3 on whole matrices (hope-math invariants 18 and 19)."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch

from hope.config import ModelConfig
from hope.model import Model
from hope.optim import newton_schulz
from hope.optim.build import build_optimizer
from hope.optim.config import M3Config, OptimConfig
from hope.optim.levels import parameter_groups

MUON = OptimConfig(name="muon", lr=0.02, beta1=0.95, weight_decay=0.1)
M3 = OptimConfig(name="m3", lr=0.02, m3=M3Config(slow_period=3, matrix_rms=0.0), eps=1e-8)


def gradients(steps: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def m3(**settings: Any) -> OptimConfig:
    """`M3` with other settings of optim.m3."""
    return dataclasses.replace(M3, m3=dataclasses.replace(M3.m3, **settings))


def follow(config: OptimConfig, steps: int, *shape: int) -> tuple[list[torch.Tensor], dict]:
    p = torch.nn.Parameter(torch.ones(*shape, dtype=torch.float64))
    optimizer = build_optimizer([{"params": [p], "matrices": True, "weight_decay": config.weight_decay}], config)
    history = []
    for g in gradients(steps, *shape):
        p.grad = g.clone()
        optimizer.step()
        history.append(p.detach().clone())
    return history, optimizer.state[p]


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (3, 6, 6)])
def test_singular_values_go_to_one(shape):
    [matrix] = gradients(1, *shape)
    values = torch.linalg.svdvals(newton_schulz.orthogonalise(matrix, 5))
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    aligned = (u.mT @ newton_schulz.orthogonalise(matrix, 5) @ vt.mT).diagonal(dim1=-2, dim2=-1)
    assert (aligned > 0.5).all()  # the same singular vectors
    assert not newton_schulz.orthogonalise(torch.zeros(4, 4), 5).any()


def test_equal_shapes_are_batched_and_nothing_changes(monkeypatch):
    shapes = [(4, 6), (6, 4), (4, 6), (3, 4, 6)]
    stack = [gradients(1, *shape)[0] * (i + 1) for i, shape in enumerate(shapes)]
    alone = [newton_schulz.orthogonalise(m, 5) for m in stack]
    calls = []
    original = newton_schulz.orthogonalise
    spy = lambda m, n, half: (calls.append(tuple(m.shape)), original(m, n, half))[1]
    monkeypatch.setattr(newton_schulz, "orthogonalise", spy)
    together = newton_schulz.orthogonalise_all(stack, 5)
    assert calls == [(5, 4, 6), (1, 6, 4)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setitem(newton_schulz.CHUNK, "cuda", 10)  # 40 elements at a time: every matrix in a batch of its own
    calls.clear()
    newton_schulz.orthogonalise_all(stack, 5)
    assert len(calls) == 4


def test_bf16_products_are_nearly_the_same():
    [matrix] = gradients(1, 12, 20)
    exact, rough = (newton_schulz.orthogonalise(matrix, 5, half) for half in (False, True))
    assert rough.dtype == exact.dtype
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", [MUON, M3], ids=lambda config: config.name)
def test_a_run_in_fp32_orthogonalises_in_fp32_on_a_gpu_too(config):
    [gradient] = gradients(1, 64, 96)

    def a_step(device: str, precision: str) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(64, 96, device=device))
        optimizer = build_optimizer([{"params": [p], "matrices": True}], config, precision)
        p.grad = gradient.float().to(device)
        optimizer.step()
        return p.detach().cpu()

    expected = a_step("cpu", "fp32")
    error = lambda step: ((step - expected).norm() / expected.norm()).item()
    assert error(a_step("cuda", "fp32")) < 1e-4
    assert error(a_step("cuda", "bf16")) > 1e-3


def test_a_precision_reaches_the_orthogonalisation():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    half = [build_optimizer([{"params": [p], "matrices": True}], MUON, word).half for word in ("fp32", "bf16")]
    assert half == [False, True]


def test_muon_is_torchs():
    """Torch iterates in bf16: 2e-2 of an update whose entries are about lr x 0.2."""
    found, _ = follow(MUON, 5, 16, 48)
    p = torch.nn.Parameter(torch.ones(16, 48))
    reference = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for g in gradients(5, 16, 48):
        p.grad = g.float()
        reference.step()
    moved = (found[-1] - 1).norm()
    assert (found[-1] - p.detach()).norm() < 2e-2 * moved
    assert (follow(dataclasses.replace(MUON, beta1=0.5), 5, 16, 48)[0][-1] - p.detach()).norm() > 0.1 * moved


def test_a_stack_of_heads_is_a_batch_of_matrices():
    whole, _ = follow(MUON, 3, 4, 6, 6)
    for head in range(4):
        p = torch.nn.Parameter(torch.ones(6, 6, dtype=torch.float64))
        optimizer = build_optimizer([{"params": [p], "matrices": True, "weight_decay": 0.1}], MUON)
        for g in gradients(3, 4, 6, 6):
            p.grad = g[head].clone()
            optimizer.step()
        torch.testing.assert_close(whole[-1][head], p.detach())


@pytest.fixture
def without_orthogonalisation(monkeypatch):
    monkeypatch.setattr(newton_schulz, "orthogonalise", lambda matrix, steps, half: matrix)


def test_m3_without_orthogonalisation_is_adam_or_adagrad(without_orthogonalisation):
    ema, _ = follow(m3(alpha=0.0), 7, 4, 6)
    literal, _ = follow(m3(alpha=0.0, reading="literal"), 7, 4, 6)
    for reading, history in (("ema", ema), ("literal", literal)):
        p, m, v = (torch.full((4, 6), x, dtype=torch.float64) for x in (1.0, 0.0, 0.0))
        for g, found in zip(gradients(7, 4, 6), history, strict=True):
            m = 0.9 * m + 0.1 * g if reading == "ema" else m + 0.9 * g
            v = 0.95 * v + 0.05 * g * g if reading == "ema" else v + 0.95 * g * g
            p = p * (1 - 0.02 * 0.1) - 0.02 * m / (v.sqrt() + 1e-8)
            torch.testing.assert_close(found, p)


@pytest.mark.parametrize("reading", ["ema", "literal"])
def test_the_slow_memory_moves_every_f_updates_and_sees_the_chunk_before(reading):
    """O2 of chunk k is made of gradients of the chunks before it, never of its own; the first chunk has none."""
    config = m3(reading=reading)
    p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
    optimizer = build_optimizer([{"params": [p], "matrices": True}], config)
    seen = gradients(9, 4, 6)
    slow, directions = torch.zeros(4, 6, dtype=torch.float64), []
    for step, g in enumerate(seen):
        p.grad = g.clone()
        optimizer.step()
        if step % 3 == 0 and step:
            chunk = sum(seen[step - 3 : step])
            slow = 0.9 * slow + 0.1 * chunk / 3 if reading == "ema" else slow + 0.9 * chunk
        torch.testing.assert_close(optimizer.state[p]["slow"], slow)
        directions.append(optimizer.state[p]["slow_direction"].clone())
    assert not directions[2].any()
    assert directions[3].any()
    torch.testing.assert_close(directions[3], newton_schulz.orthogonalise(sum(seen[:3]), 5))
    assert [torch.equal(a, b) for a, b in pairwise(directions)] == [
        True, True, False, True, True, False, True, True,
    ]  # fmt: skip


def test_every_matrix_of_a_model_and_nothing_else_is_orthogonalised():
    static = lambda which: {"hope": {"static": which}}
    sizes = {"vocab_size": 32, "width": 16, "layers": 1, "heads": 2}
    model = Model(ModelConfig(**sizes, tie_embeddings=False, mixers=static("learned")))
    groups = parameter_groups(model, 0.1, MUON)
    matrices = {name for group in groups if group["matrices"] for name in group["names"]}
    assert {name.removeprefix("blocks.0.") for name in matrices} == {
        *(f"mixer.{name}.weight" for name in ("input", "query", "gate", "output")),
        *(f"mixer.{name}" for name in ("static_k", "static_v")),
        *(f"mixer.memories.initial.{name}" for name in ("k", "v", "eta", "alpha", "main")),
        *(f"cms.levels.{level}.mlp.{part}.weight" for level in (0, 1) for part in ("gate", "up", "down")),
    }
    projected = ModelConfig(**sizes, mixers=static("projected"))
    also = {n for group in parameter_groups(Model(projected), 0.1, MUON) if group["matrices"] for n in group["names"]}
    assert also - matrices == {f"blocks.0.mixer.{name}.weight" for name in ("key", "value")}
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [group["name"] for group in parameter_groups(model, 0.1)] == [
        "base", "base.undecayed", "cms0", "cms0.undecayed", "cms1", "cms1.undecayed",
    ]  # fmt: skip


def test_adamws_rms_at_the_same_learning_rate():
    """An update of muon and of m3's ema reading has root mean square matrix_rms x lr."""
    for name in ("muon", "m3"):
        config = OptimConfig(name=name, lr=0.01, weight_decay=0.0)
        history, _ = follow(config, 2, 64, 64)
        assert (history[1] - history[0]).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.15)
