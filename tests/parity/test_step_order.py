"""A call out of order in a step is refused by every sharded optimizer, before it could change a number."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
from hope_run import SEQ, micro_batches, model_config
from multirank import run_ranks

from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from parallel.compute.replica import Replica, build_replica
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.matrix_zero import MatrixZeroOptimizer
from parallel.optimizer.sharded import ShardedOptimizer
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start import groups

OPTIMIZERS = {"adamw": ZeroOptimizer, "muon": MatrixZeroOptimizer}
LOCAL = "local"


def replica_of(ranks: groups.Ranks, layout: ParallelConfig, name: str, accumulate: str = LOCAL) -> Replica:
    optim = OptimConfig(name=name, lr=1e-3, warmup=0, accumulate=accumulate)
    replica = build_replica(model_config(), optim, layout, ranks, seq_len=SEQ, precision="fp32", seed=1)
    assert type(replica.optimizer) is OPTIMIZERS[name]
    return replica


def told(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError, match="out of order") as error:
        call()
    return str(error.value)


def misordered(name: str) -> tuple[list[str], list[str], list[str], float]:
    """Messages before `prepare`, before `reduce` and after it; and a norm after all of them."""
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        replica = replica_of(ranks, ParallelConfig(), name)
        optimizer, parameter = replica.optimizer, replica.models[0].embedding.weight
        accumulated = lambda: optimizer.accumulated(parameter)
        pieces = lambda: list(optimizer.gradient_pieces())
        reading = (optimizer.step, optimizer.grad_norms, optimizer.first_nonfinite, pieces)
        replica.run(micro_batches(0, ranks.dp_rank, ranks.dp_size))
        unprepared = [told(call) for call in (accumulated, optimizer.reduce, *reading)]
        optimizer.prepare()
        unreduced = [told(call) for call in (optimizer.prepare, *reading)]
        optimizer.reduce()
        reduced = [told(call) for call in (optimizer.prepare, optimizer.reduce, accumulated)]
        return unprepared, unreduced, reduced, optimizer.grad_norms()["base"]


def in_order(name: str) -> float:
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        replica = replica_of(ranks, ParallelConfig(), name)
        replica.run(micro_batches(0, ranks.dp_rank, ranks.dp_size))
        replica.reduce()
        return replica.optimizer.grad_norms()["base"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_calls_out_of_order_are_refused(name: str) -> None:
    [norm, _] = run_ranks(in_order, 2, name)
    for unprepared, unreduced, reduced, found in run_ranks(misordered, 2, name):
        assert unprepared[0].startswith("accumulated() out of order: this step is not prepared; call prepare() once")
        assert unprepared[1].startswith("reduce() out of order: this step is not prepared; call prepare() once")
        assert all(message.endswith("call reduce() first") for message in unprepared[2:])
        assert unreduced[0].startswith("prepare() out of order: this step is prepared")
        assert all(message.endswith("call reduce() first") for message in unreduced[1:])
        assert [message.partition("()")[0] for message in reduced] == ["prepare", "reduce", "accumulated"]
        assert all("this step is reduced" in message for message in reduced)
        assert found == norm > 0


def sums_survive(name: str) -> list[float]:
    """Norms of the level of period 3 when it is due, straight and with a discarded step before it is."""
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        norms = []
        for steps in ((0, 1, 2), (0, 1, None, 2), (0, 1, 2, None, 2)):
            replica = replica_of(ranks, ParallelConfig(), name)
            found = 0.0
            for step in steps:
                replica.run(micro_batches(7 if step is None else step, ranks.dp_rank, ranks.dp_size))
                replica.reduce()
                last = replica.optimizer.grad_norms()
                found = math.hypot(*(norm for key, norm in last.items() if key.startswith("cms1")))
                if step in (0, 1):
                    replica.optimizer.step()
                else:
                    replica.optimizer.discard()
            norms.append(found)
            replica.optimizer.close()
        return norms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_discarded_due_step_leaves_what_has_waited(name: str) -> None:
    """`prepare` adds the sums to a step that may be thrown away; the next due step has them again, once."""
    for straight, skipped, repeated in run_ranks(sums_survive, 2, name):
        assert straight > 0
        assert skipped == straight
        assert repeated == straight


def without_combine() -> None:
    layout = ParallelConfig(tensor=2)
    with groups.start(layout, timeout_s=60) as ranks:
        models = replica_of(ranks, layout, "adamw", "sharded").models
        optim = OptimConfig(name="adamw", accumulate=LOCAL)
        inner = build_optimizer(parameter_groups(models, 0.1, optim), optim)
        ZeroOptimizer(models, inner, "fp32", ranks, counts=lambda name, parameter: True)


def test_waiting_gradients_with_tensor_parallelism_need_combine() -> None:
    with pytest.raises(ValueError, match=r"optim\.accumulate=local needs `combine`"):
        run_ranks(without_combine, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values())
def test_both_have_the_protocol_and_its_docstrings(optimizer: type) -> None:
    assert ShardedOptimizer in optimizer.__mro__
    methods = {name for name, _ in inspect.getmembers(optimizer, inspect.isfunction) if not name.startswith("_")}
    promised = {name for name, _ in inspect.getmembers(ShardedOptimizer, inspect.isfunction) if name[0] != "_"}
    assert promised <= {name for name in vars(optimizer) if name[0] != "_"}, "a method of the protocol is not written"
    assert all(inspect.getdoc(getattr(optimizer, name)) for name in methods)
