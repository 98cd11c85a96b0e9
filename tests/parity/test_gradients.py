"""What a step may look at and throw away: norms, the name of a bad parameter, a skipped step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multirank import run_ranks
from toy_run import Momentum, Toy, ToyRun, batch, groups_of, loss_fn, micro_batches, step_fn

from parallel.compute.pipeline import Stage, forward_backward
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start.groups import any_rank, start


def norms(precision: str, dim: int) -> dict[str, float]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, precision, dim)
        run.backward(0)
        return run.optimizer.grad_norms()


@pytest.mark.parametrize("dim", [10, 14])  # 5 and 7 elements in a group: padding on one and on several of 4 ranks
@pytest.mark.parametrize(("precision", "ranks"), [("fp32", 1), ("fp32", 2), ("fp32", 4), ("bf16", 2)])
def test_grad_norms_equal_torch(precision: str, ranks: int, dim: int) -> None:
    model = Toy(dim)
    loss_fn(model, batch(0))[0].backward()
    grads = {g["name"]: [p.grad for p in g["params"] if p.grad is not None] for g in groups_of(model)}
    expected = {name: float(torch.nn.utils.get_total_norm(tensors)) for name, tensors in grads.items()}
    for found in run_ranks(norms, ranks, precision, dim):
        assert found == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 2e-2)
        assert found["unused"] == 0.0
        assert found["gain"] > 0


def discarded(precision: str) -> tuple[bool, bool, list[float], list[float], int]:
    """Train, skip a step whose gradients are bad, train on; and the same without the bad step."""
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run, straight = ToyRun(ranks, precision), ToyRun(ranks, precision)
        run.train(range(2))
        straight.train(range(2))
        before = run.parameters(), run.states(), run.optimizer.counters()
        run.backward(9)
        run.optimizer.discard()
        after = run.parameters(), run.states(), run.optimizer.counters()
        return (
            all(torch.equal(before[0][n], after[0][n]) for n in before[0]),
            same(before[1:], after[1:]),
            run.train(range(2, 4)),
            straight.train(range(2, 4)),
            run.inner.calls,
        )


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_discard_leaves_everything_as_it_was(precision: str) -> None:
    for parameters, states, losses, straight, calls in run_ranks(discarded, 2, precision):
        assert parameters
        assert states
        assert losses == straight
        assert calls == 4


def planted(precision: str, where: str, value: float, bad_rank: int) -> tuple[dict[str, float], str | None]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, precision)
        parameter = run.model.get_parameter(where)
        if ranks.rank == bad_rank:
            hook = torch.zeros(parameter.numel(), device=ranks.device)
            hook[-1] = value
            parameter.register_hook(lambda grad: grad + hook.view_as(grad).to(grad.dtype))
        run.backward(0)
        return run.optimizer.grad_norms(), run.optimizer.first_nonfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("where", "value"), [("down.weight", math.nan), ("gain", math.inf), ("emb.weight", math.nan)])
def test_a_bad_gradient_on_one_rank_is_named_on_all(precision: str, where: str, value: float) -> None:
    for found, name in run_ranks(planted, 2, precision, where, value, 1):
        assert not all(math.isfinite(norm) for norm in found.values())
        assert name == where


def test_no_bad_gradient_no_name() -> None:
    assert [name for _, name in run_ranks(planted, 2, "fp32", "gain", 0.0, 1)] == [None, None]


def used_on_one_rank(precision: str) -> dict[str, float]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, precision)
        pairs = micro_batches(0, ranks, 4)

        def with_branch(model: Toy, hidden: None, pair: tuple) -> tuple[torch.Tensor, dict]:
            loss, report = loss_fn(model, pair)
            return (loss + model.unused.sum() if ranks.rank == 1 else loss), report

        forward_backward(run.stage, pairs, with_branch)
        run.optimizer.prepare()
        run.optimizer.reduce()
        return run.optimizer.grad_norms()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parameter_used_on_one_rank_only(precision: str) -> None:
    """Its gradient is 1 on one rank of two and absent on the other: 1/2 for each of its 3 elements."""
    for found in run_ranks(used_on_one_rank, 2, precision, timeout=20):
        assert found["unused"] == pytest.approx(0.5 * math.sqrt(3), rel=1e-6)


def use_and_misuse() -> tuple[list[str], float, bool, bool]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks)
        messages = []
        for call in (run.optimizer.step, run.optimizer.grad_norms, run.optimizer.first_nonfinite):
            with pytest.raises(RuntimeError, match="call reduce"):
                call()
        stranger = Toy()
        with pytest.raises(ValueError, match="not in the model") as error:
            ZeroOptimizer(run.model, Momentum(groups_of(stranger)), "fp32", ranks)
        messages.append(str(error.value))
        with pytest.raises(ValueError, match="precision is 'fp16'"):
            ZeroOptimizer(stranger, Momentum(groups_of(stranger)), "fp16", ranks)
        evaluation = forward_backward(run.stage, micro_batches(0, ranks, 2), step_fn, forward_only=True)
        untouched = all(p.grad is None for p in run.model.parameters())
        asked = any_rank(ranks.rank == 1)
        loss = float(torch.stack([r["loss"] for r in evaluation]).mean())
        return messages, loss, untouched, asked and not any_rank(False)


def test_evaluation_leaves_no_gradient_and_misuse_is_told() -> None:
    results = run_ranks(use_and_misuse, 2)
    whole = loss_fn(Toy(), batch(0))[0].item()
    assert sum(loss for _, loss, _, _ in results) / 2 == pytest.approx(whole, rel=1e-6)
    for messages, _, untouched, asked in results:
        assert "'matrices' has 4" in messages[0]
        assert untouched
        assert asked


def reported_losses(micro: int) -> list[float]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        stage = Stage(Toy().to(ranks.device))
        return [float(r["loss"]) for r in forward_backward(stage, micro_batches(0, ranks, micro), step_fn)]


def test_reported_losses_are_not_divided_by_the_number_of_micro_batches() -> None:
    [losses] = run_ranks(reported_losses, 1, 2)
    tokens, targets = batch(0)
    pairs = zip(tokens.split(2), targets.split(2), strict=True)
    assert losses == pytest.approx([loss_fn(Toy(), pair)[0].item() for pair in pairs], rel=1e-6)


def collectives_of_a_step(precision: str) -> list[list[str]]:
    seen: list[str] = []
    moving = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce", "reduce_scatter_tensor")
    for name in (*moving, "broadcast", "barrier"):
        setattr(dist, name, counted(getattr(dist, name), name, seen))  # DeepSpeed keeps what it finds at start
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = ToyRun(ranks, precision)
        phases = []
        forward_backward(run.stage, micro_batches(0, ranks, 1), step_fn)
        run.optimizer.prepare()
        for phase in (run.optimizer.reduce, run.optimizer.grad_norms, run.optimizer.step):
            seen.clear()
            phase()
            phases.append(list(seen))
        return phases


def counted(call: Callable, name: str, seen: list[str]) -> Callable:
    def wrapper(*args: Any, **options: Any) -> Any:
        seen.append(name)
        return call(*args, **options)

    return wrapper


@pytest.mark.parametrize(
    ("precision", "reduction"), [("fp32", ["all_reduce"]), ("bf16", ["reduce_scatter_tensor"] * 4)]
)
def test_a_step_reduces_once_and_gathers_once_per_group(precision: str, reduction: list[str]) -> None:
    """fp32: once for all groups."""
    for reduce, norms_, step in run_ranks(collectives_of_a_step, 2, precision):
        assert reduce == reduction
        assert norms_ == ["all_reduce"]
        assert step == ["all_gather_into_tensor"] * 4
