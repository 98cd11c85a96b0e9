"""Levels that communicate their gradients only when due: bytes on the wire, and the same training as every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multirank import run_ranks
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load
from hope.batch import Batch
from hope.block import RECOMPUTE
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, Slice
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica, build_replica
from parallel.layout.memory import StepShape
from parallel.layout.topology import ParallelConfig
from parallel.layout.traffic import data_ring_bytes, reduced_bytes_per_step, tensor_ring_bytes
from parallel.referee.evidence import micro_batches
from parallel.start import groups

MODEL = ModelConfig(["attention"], 64, 32, 2, 4, cms=CmsConfig(periods=[1, 4, 16], hidden=32))
OPTIM = OptimConfig(lr=3e-3, eps=1e-4)
SEQ, BATCH = 16, 4


def batch(step: int) -> Batch:
    tokens = torch.randint(0, 64, (SEQ + 1, BATCH), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:-1], tokens[1:], None)


class Wire:
    """Counts the bytes of every reduction over the data-parallel ranks, at torch's collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all_reduce, self._reduce_scatter = dist.all_reduce, dist.reduce_scatter_tensor
        dist.all_reduce, dist.reduce_scatter_tensor = self.all_reduce, self.reduce_scatter

    def all_reduce(self, tensor, *args, **kwargs):
        self._count(tensor, kwargs.get("group"))
        return self._all_reduce(tensor, *args, **kwargs)

    def reduce_scatter(self, output, tensor, *args, **kwargs):
        self._count(tensor, kwargs.get("group"))
        return self._reduce_scatter(output, tensor, *args, **kwargs)

    def _count(self, tensor, group) -> None:
        if group is groups.data_group():
            self.bytes += tensor.numel() * tensor.element_size()


def one_step(replica: Replica, step: int, skip: bool = False) -> float:
    reports = replica.run(micro_batches(batch(step), 1, replica.ranks))
    replica.reduce()
    norm = sum(n * n for n in replica.optimizer.grad_norms().values()) ** 0.5
    if skip:
        replica.optimizer.discard()
    else:
        replica.optimizer.step(min(1.0, 0.7 / norm))
    return groups.loss_on_all_ranks(mean_loss(reports, replica.ranks.device), replica.ranks).item()


def build(
    ranks: groups.Ranks,
    optim: OptimConfig,
    precision: str = "fp32",
    model: ModelConfig = MODEL,
    sequence: bool = True,
) -> Replica:
    layout = ParallelConfig(tensor=ranks.tp_size, sequence=sequence and ranks.tp_size > 1)
    return build_replica(model, optim, layout, ranks, seq_len=SEQ, precision=precision, seed=1)


def train(accumulate: str, name: str, precision: str, tensor: int, steps: int) -> tuple[list[float], list[int], int]:
    with groups.start(ParallelConfig(tensor=tensor), timeout_s=60) as ranks:
        replica = build(ranks, dataclasses.replace(OPTIM, accumulate=accumulate, name=name), precision)
        wire, losses, told = Wire(), [], []
        for step in range(steps):
            # a bad step in the middle of every level's period, which must leave no trace
            losses.append(one_step(replica, step, skip=step == 18))
            told.append(replica.optimizer.reduced_bytes)
        return losses, told, wire.bytes


@pytest.mark.parametrize(
    ("name", "precision", "tensor"),
    [
        ("dmgd", "fp32", 1),
        ("dmgd", "bf16", 1),
        ("muon", "fp32", 1),
        pytest.param("dmgd", "fp32", 2, marks=pytest.mark.slow),
    ],
)
def test_bytes_are_as_predicted_and_the_training_is_the_same(name, precision, tensor):
    """49 steps, one of them skipped: three whole periods of the slowest level."""
    found = {}
    for accumulate in ("sharded", "local"):
        ranks = run_ranks(train, 2 * tensor, accumulate, name, precision, tensor, 49, timeout=120)
        losses, told, wire = found[accumulate] = ranks[0]
        assert all(rank[0] == losses for rank in ranks)
        assert sum(told) == wire
        shape = StepShape(SEQ, 1, precision == "bf16", tensor, tensor > 1, 2)
        optim = dataclasses.replace(OPTIM, accumulate=accumulate, name=name)
        predicted = reduced_bytes_per_step(MODEL, [Slice(0, 2)], shape, optim)
        slack = 0.3 if name == "muon" else 0.02  # 18 small matrices in two slots of equal size
        # the skipped step was reduced too: 49 steps, of which none of the slow levels' was due twice
        assert wire / 48 == pytest.approx(predicted * 49 / 48, rel=slack)
    (local, _, few), (sharded, _, many) = found["local"], found["sharded"]
    assert few < 0.8 * many
    bound = 1e-5 if precision == "fp32" else 1e-3
    assert local[-1] == pytest.approx(sharded[-1], rel=bound)
    assert local == pytest.approx(sharded, rel=10 * bound)


class Ring:
    """Bytes that a rank moves in rings, of the collectives of a group that have at least `smallest` numbers.

    Made before the groups are: DeepSpeed keeps the functions that it finds.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup], smallest: int) -> None:
        from megatron.core.tensor_parallel import mappings

        self.bytes, self._group, self._smallest = 0.0, group, smallest
        dist.all_reduce = self._counting(dist.all_reduce, 0, "tensor", 2)
        dist.all_gather_into_tensor = self._counting(dist.all_gather_into_tensor, 0, "output_tensor", 1)
        mappings.dist_all_gather_func = dist.all_gather_into_tensor
        dist.reduce_scatter_tensor = self._counting(dist.reduce_scatter_tensor, 1, "input", 1)
        mappings.dist_reduce_scatter_func = dist.reduce_scatter_tensor

    def _counting(self, collective: Any, place: int, name: str, times: int) -> Any:
        """`place` and `name`: of the argument that is as large as all ranks' parts together."""

        def counted(*args: Any, **more: Any) -> Any:
            tensor = args[place] if len(args) > place else more[name]
            if more.get("group") is not None and more["group"] is self._group() and tensor.numel() >= self._smallest:
                size = dist.get_world_size(more["group"])
                self.bytes += times * (size - 1) / size * tensor.numel() * tensor.element_size()
            return collective(*args, **more)

        return counted


def trunk_sums(model: ModelConfig, precision: str, sequence: bool, recompute: str) -> float:
    ring = Ring(groups.tensor_group, SEQ * 2 * model.width)
    with groups.start(ParallelConfig(tensor=2, sequence=sequence), timeout_s=60) as ranks:
        replica = build(ranks, OPTIM, precision, model, sequence)
        replica.models[0].set_recompute(recompute)
        replica.run(micro_batches(batch(0), 2, ranks))
        return ring.bytes


MODELS = {
    "hope": ModelConfig(
        ["hope"],
        64,
        32,
        2,
        4,
        mixers={"hope": MemoryConfig(projection_chunk=4, main_chunk=8)},
        cms=CmsConfig(periods=[1, 4]),
    ),
    "attention": MODEL,
}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize(
    ("kind", "precision", "recompute"),
    [*(("hope", "fp32", recompute) for recompute in RECOMPUTE), ("attention", "bf16", "block")],
)
def test_activations_that_tensor_ranks_sum_are_as_predicted(kind, precision, recompute, sequence):
    """Counted at torch's collectives: an all-reduce of two sequences moves twice what a gather of them does."""
    model = MODELS[kind]
    shape = StepShape(SEQ, 2, precision == "bf16", 2, sequence, recompute=recompute)
    predicted = BATCH // 2 * tensor_ring_bytes(model, [Slice(0, 2)], shape)
    assert run_ranks(trunk_sums, 2, model, precision, sequence, recompute) == [predicted, predicted]


def whole_period(model: ModelConfig, optim: OptimConfig, precision: str) -> float:
    """Of four steps, of the data-parallel ranks."""
    ring = Ring(groups.data_group, 1)
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        replica = build(ranks, optim, precision, model)
        ring.bytes = 0.0
        for step in range(4):
            one_step(replica, step)
        return ring.bytes


@pytest.mark.parametrize(("name", "precision"), [("dmgd", "fp32"), ("dmgd", "bf16"), ("muon", "bf16")])
@pytest.mark.parametrize("accumulate", ["sharded", "local"])
def test_gradients_and_weights_of_data_ranks_are_as_predicted(name, precision, accumulate):
    model = dataclasses.replace(MODEL, cms=CmsConfig(periods=[1, 4], hidden=32))
    optim = dataclasses.replace(OPTIM, accumulate=accumulate, name=name)
    shape = StepShape(SEQ, 1, precision == "bf16", data=2)
    predicted = 4 * data_ring_bytes(model, [Slice(0, 2)], shape, optim)
    assert run_ranks(whole_period, 2, model, optim, precision) == [predicted, predicted]


def quiet_between(name: str) -> list[tuple[bool, bool]]:
    """(moved, communicated) of the slow level over eight steps with period 4."""
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        model = dataclasses.replace(MODEL, cms=CmsConfig(periods=[1, 4], hidden=32))
        replica = build(ranks, dataclasses.replace(OPTIM, accumulate="local", name=name), model=model)
        weight = replica.models[0].blocks["0"].cms.levels[1].mlp.up.weight
        seen = []
        for step in range(8):
            before = weight.detach().clone()
            one_step(replica, step)
            seen.append((not torch.equal(before, weight), replica.optimizer.reduced_bytes))
        return [(moved, size > min(s for _, s in seen)) for moved, size in seen]


@pytest.mark.parametrize("name", ["dmgd", "muon"])
def test_a_level_is_silent_until_it_is_due(name):
    for seen in run_ranks(quiet_between, 2, name, timeout=120):
        assert seen == [(False, False), (False, False), (False, False), (True, True)] * 2


def a_planted_nan(accumulate: str) -> tuple[list[str | None], bool]:
    """The slow level's gradient is bad in step 2, which only this level sees."""
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        model = dataclasses.replace(MODEL, cms=CmsConfig(periods=[1, 4], hidden=32))
        replica = build(ranks, dataclasses.replace(OPTIM, accumulate=accumulate), model=model)
        weight = replica.models[0].blocks["1"].cms.levels[1].mlp.up.weight
        names = []
        for step in range(4):
            replica.run(micro_batches(batch(step), 1, ranks))
            if step == 1 and ranks.rank == 1:
                weight.grad[3, 2] = float("nan")
            replica.reduce()
            finite = all(n == n for n in replica.optimizer.grad_norms().values())
            names.append(None if finite else replica.optimizer.first_nonfinite())
            replica.optimizer.step() if finite else replica.optimizer.discard()
        return names, bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("accumulate", ["sharded", "local"])
def test_a_bad_gradient_of_a_waiting_level_is_seen_at_once(accumulate):
    for names, finite in run_ranks(a_planted_nan, 2, accumulate, timeout=120):
        assert names == [None, "blocks.1.cms.levels.1.mlp.up.weight", None, None]
        assert finite


def test_periods_in_tokens_are_periods_in_steps():
    tokens = dataclasses.replace(MODEL, cms=CmsConfig(periods=[64, 256, 1024], unit="tokens"))
    with torch.device("meta"):
        model = Model(tokens)
    periods = {g["name"]: g["period"] for g in parameter_groups(model, 0.0, tokens_per_step=64)}
    assert (periods["cms0"], periods["cms1"], periods["cms2"]) == (1, 4, 16)
    with pytest.raises(ValueError, match="1000"):
        parameter_groups(model, 0.0, tokens_per_step=1000)


def test_a_period_that_no_number_of_steps_sees_is_refused(tmp_path):
    """128 tokens per step: 300 lies between two and three steps."""
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path), ["model.cms.unit=tokens", "model.cms.periods=[128,300]"])
    [(path, what, fix)] = caught.value.problems
    assert path == "model.cms.periods[1]"
    assert "300" in what
    assert "128" in what
    assert fix == "256 or 384"
