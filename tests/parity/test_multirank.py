"""The harness that all multi-process tests stand on: results, tracebacks, hangs, forks after a backward."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from multirank import RankDied, RankTimeout, run_ranks
from toy_run import ToyRun

from parallel.layout.topology import ParallelConfig
from parallel.start.groups import start


def world(factor: int) -> tuple[int, int, int]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        total = torch.tensor([ranks.rank * factor], device=ranks.device)
        dist.all_reduce(total)
        return ranks.rank, ranks.dp_size, int(total)


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(world, 3, 10) == [(0, 3, 30), (1, 3, 30), (2, 3, 30)]


def fail_on(rank: int) -> None:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        if ranks.rank == rank:
            raise KeyError("the reason")
        dist.all_reduce(torch.zeros(1))  # its peer is gone: waits until the harness ends it


def test_a_failure_is_raised_here_with_its_traceback() -> None:
    began = time.monotonic()
    with pytest.raises(KeyError, match="the reason") as error:
        run_ranks(fail_on, 2, 1)
    [note] = error.value.__notes__
    assert "on rank 1" in note
    assert 'raise KeyError("the reason")' in note
    assert time.monotonic() - began < 15


def hang() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def test_a_hang_fails_and_shows_where() -> None:
    began = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[1\] did not finish in 5 s") as error:
        run_ranks(hang, 2, timeout=5)  # a busy machine needs some of it to begin
    assert "in hang" in str(error.value)
    assert time.monotonic() - began < 30


def lose_a_peer() -> str:
    with start(ParallelConfig(), timeout_s=2) as ranks:
        if ranks.rank == 1:
            time.sleep(6)
            return ""
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1))
        assert time.monotonic() - began < 5
        os._exit(7)


def test_the_process_group_timeout_ends_a_collective() -> None:
    with pytest.raises(RankDied, match="exit code 7"):
        run_ranks(lose_a_peer, 2)


def backward() -> float:
    x = torch.randn(400, 400, requires_grad=True)
    (x @ x).relu().sum().backward()
    assert x.grad is not None
    return float(x.grad.abs().sum())


def test_fork_after_the_parent_ran_a_backward_with_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert backward() > 0
        assert all(value > 0 for value in run_ranks(backward, 2, timeout=30))
        assert backward() > 0
    finally:
        torch.set_num_threads(before)


def twice_in_one_process() -> list[list[float]]:
    losses = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    for precision in ("fp32", "bf16", "fp32"):
        with start(ParallelConfig(), timeout_s=30) as ranks:
            assert ranks.world_size == 1
            losses.append(ToyRun(ranks, precision).train(range(2)))
        assert not dist.is_initialized()
        assert "RANK" not in os.environ
    return losses


def test_no_launcher_is_one_process_and_start_can_be_repeated() -> None:
    [[first, other, again]] = run_ranks(twice_in_one_process, 1)
    assert first == again
    assert first != other
