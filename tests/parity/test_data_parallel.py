"""Data parallel training through megatron-core's schedule and DeepSpeed's ZeRO-1 equals plain torch."""

from __future__ import annotations

import functools

import pytest
import torch
from multirank import run_ranks
from toy_run import MOMENTUM, Momentum, Toy, ToyRun, batch, groups_of, loss_fn

from hope.batch import Batch
from hope.config import ModelConfig
from hope.optim.config import OptimConfig
from parallel.compute.replica import build_replica
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start.groups import start

STEPS = 4
Result = tuple[list[float], dict[str, torch.Tensor], int]


def train(precision: str, micro: int, clip_scale: float) -> Result:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, precision, micro=micro)
        losses = run.train(range(STEPS), clip_scale)
        return losses, run.parameters(), run.inner.calls


@functools.lru_cache
def plain_torch(clip_scale: float = 1.0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training by torch's own SGD without schedule, DeepSpeed or processes: one batch, whole parameters."""
    model = Toy()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": group["params"], "lr": group.get("lr", MOMENTUM.lr)} for group in groups_of(model)]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM.beta1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss, _ = loss_fn(model, batch(step))
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(clip_scale)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any parameter, relative to that parameter's largest element."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_fp32_equals_plain_torch(ranks: int, micro: int) -> None:
    losses, parameters = plain_torch()
    for rank_losses, rank_parameters, calls in run_ranks(train, ranks, "fp32", micro, 1.0):
        assert rank_losses == pytest.approx(losses, rel=1e-6)
        assert distance(rank_parameters, parameters) <= 1e-6
        assert calls == STEPS  # the optimizer sees all groups in one call


def test_bf16_on_two_ranks_equals_one() -> None:
    """The forward passes are the same, and fp32 sums in another order; parameters may round to the next bf16."""
    [(losses, parameters, _)] = run_ranks(train, 1, "bf16", 1, 1.0)
    for rank_losses, rank_parameters, calls in run_ranks(train, 2, "bf16", 1, 1.0):
        assert rank_losses == pytest.approx(losses, rel=1e-4)
        assert distance(rank_parameters, parameters) <= 2**-8
        assert calls == STEPS
    assert losses == pytest.approx(plain_torch()[0], rel=1e-2)
    assert losses != pytest.approx(plain_torch()[0], rel=1e-6)  # it did compute in bf16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clip_scale_reaches_the_optimizer(precision: str) -> None:
    losses, parameters = plain_torch(0.25)
    rel, apart = (1e-6, 1e-6) if precision == "fp32" else (1e-2, 2e-2)
    for rank_losses, rank_parameters, _ in run_ranks(train, 2, precision, 4, 0.25):
        assert rank_losses == pytest.approx(losses, rel=rel)
        assert distance(rank_parameters, parameters) <= apart
    assert distance(parameters, plain_torch(1.0)[1]) > 0.1  # else the scale could be ignored unseen


def small_steps(lr: float) -> tuple[float, float]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, "bf16")
        run.optimizer.set_lr(lr)
        masters = run.states()
        before = run.parameters()
        run.train(range(1))
        after = run.states()
        moved = max((after[k] - masters[k]).abs().max().item() for k in masters if k[0] == "master")
        return moved, distance(run.parameters(), before)


def test_bf16_masters_keep_updates_below_bf16_resolution() -> None:
    for moved, visible in run_ranks(small_steps, 2, 1e-6):
        assert 0 < moved < 1e-5
        assert visible == 0


def weights_after_start() -> torch.Tensor:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        model = Toy(seed=50 + ranks.rank)
        ZeroOptimizer(model, Momentum(groups_of(model)), "fp32", ranks)
        return model.up.weight.detach().clone()


def test_every_rank_starts_from_rank_zero() -> None:
    first, second = run_ranks(weights_after_start, 2)
    assert torch.equal(first, second)
    assert torch.equal(first, Toy(seed=50).up.weight)


def misaligned(name: str) -> list[str]:
    """Parameters of whole 16 bytes that do not begin at 16 bytes, of a HOPE with three heads after a step."""
    torch.set_num_threads(1)
    config = ModelConfig(vocab_size=64, width=48, layers=2, heads=3)
    with start(ParallelConfig()) as ranks:
        replica = build_replica(
            config, OptimConfig(name=name), ParallelConfig(), ranks, seq_len=16, precision="bf16", seed=0
        )
        tokens = torch.zeros(17, 2, dtype=torch.long)
        replica.run([Batch(tokens[:-1], tokens[1:])])
        replica.reduce()
        replica.optimizer.step()
        named = [pair for model in replica.models for pair in model.named_parameters()]
        assert any(p.numel() % 8 for _, p in named)  # one that could be in the way
        return [n for n, p in named if p.numel() % 8 == 0 and p.data_ptr() % 16]


@pytest.mark.parametrize("name", ["dmgd", "muon"])
def test_parameters_in_bf16_are_aligned_for_the_kernels(name: str) -> None:
    assert run_ranks(misaligned, 1, name) == [[]]
