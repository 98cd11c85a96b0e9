"""Save in one layout, load in another: what the ranks of a run hold, put together under single-device names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from hope_run import SEQ, micro_batches, model_config
from multirank import run_ranks
from optims import with_dmgd

from hope.optim.config import M3Config, OptimConfig
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica, build_replica
from parallel.layout.plan import plan_of_config
from parallel.layout.topology import ParallelConfig
from parallel.start.groups import loss_on_all_ranks, start

# As in hope_run: with Adam's usual eps, elements whose gradient is rounding noise move by a whole learning rate.
OPTIMIZERS = {
    "linear": OptimConfig(lr=3e-3, warmup=0, eps=1e-3),
    "mlp": with_dmgd(lr=3e-3, warmup=0, eps=1e-3, memory="mlp", mlp_lr=0.5),
    "mlp-local": with_dmgd(lr=3e-3, warmup=0, eps=1e-3, memory="mlp", mlp_lr=0.5, accumulate="local"),
    "muon": OptimConfig(lr=3e-3, warmup=0, eps=1e-3, name="muon"),
    "m3": OptimConfig(lr=3e-3, warmup=0, eps=1e-3, name="m3", m3=M3Config(slow_period=2)),
}
LAYOUTS = {
    "1": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "dp4": (4, ParallelConfig()),
    "tp2-dp2": (4, ParallelConfig(tensor=2)),
    "pp2-dp2": (4, ParallelConfig(pipeline=2)),
    "tp2-pp2": (4, ParallelConfig(tensor=2, pipeline=2, sequence=True)),
    "tp2-pp2-dp2": (8, ParallelConfig(tensor=2, pipeline=2)),
    "pp2-vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
}
SAVED_AT = 4  # in the middle of the second level's period of 3
Tensors = dict[str, torch.Tensor]


@dataclass
class Held:
    """What one rank holds: (key, name, scope, offset, values) of its states, clocks, and shapes of its shards."""

    place: tuple[int, int, int]
    pieces: list[tuple[str, str, str, int, torch.Tensor]]
    counters: dict[str, dict[str, int]]
    shapes: dict[str, tuple[int, ...]]


def build(layout: ParallelConfig, optimizer: str, ranks, seed: int, precision: str = "fp32") -> Replica:
    return build_replica(
        model_config(layers=4), OPTIMIZERS[optimizer], layout, ranks, seq_len=SEQ, precision=precision, seed=seed
    )


def train(replica: Replica, steps: range, optimizer: str) -> list[float]:
    """The loss of every step, the same number on every rank."""
    losses, ranks = [], replica.ranks
    for step in steps:
        reports = replica.run(micro_batches(step, ranks.dp_rank, ranks.dp_size))
        replica.reduce()
        losses.append(loss_on_all_ranks(mean_loss(reports, ranks.device), ranks).item())
        replica.optimizer.set_lr(OPTIMIZERS[optimizer].lr)
        norms = replica.optimizer.grad_norms()
        total = math.sqrt(sum(n * n for n in norms.values()))
        replica.optimizer.step(min(1.0, 1.0 / (total + 1e-6)))
    return losses


def held(replica: Replica) -> Held:
    pieces = [(p.key, p.name, p.scope, p.offset, p.values.clone()) for p in replica.optimizer.pieces()]
    shapes = {name: tuple(p.shape) for model in replica.models for name, p in model.named_parameters()}
    place = replica.ranks.dims.coordinates(replica.ranks.rank)
    return Held(place, pieces, replica.optimizer.counters(), shapes)


def joined(everyone: list[Held]) -> Tensors:
    """Whole tensors by KEY/NAME; ranks that hold the same must agree."""
    flats: dict[tuple[str, str, str, int, int], dict[int, torch.Tensor]] = {}
    shapes: dict[tuple[str, int, int], tuple[int, ...]] = {}
    for rank in everyone:
        tensor, pipeline, _ = rank.place
        shapes |= {(name, tensor, pipeline): shape for name, shape in rank.shapes.items()}
        for key, name, scope, offset, values in rank.pieces:
            there = flats.setdefault((key, name, scope, tensor, pipeline), {}).setdefault(offset, values)
            assert torch.equal(there, values), f"{key} of {name} differs between ranks that hold the same"
    shards: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
    for (key, name, scope, tensor, pipeline), parts in flats.items():
        flat = torch.cat([parts[offset] for offset in sorted(parts)])
        shape = shapes[name, tensor, pipeline] if scope == "shard" else flat.shape
        shards.setdefault(f"{key}/{name}", {}).setdefault(pipeline, {})[tensor] = flat.view(shape)
        if scope == "tensor":
            shards[f"{key}/{name}"][pipeline] = {0: flat}
    whole: Tensors = {}
    plan = plan_of_config(model_config(layers=4))
    for name, stages in shards.items():
        for of_tensor in stages.values():
            parts = [of_tensor[rank] for rank in sorted(of_tensor)]
            joint = plan[name.partition("/")[2]].join(parts) if len(parts) > 1 else parts[0]
            assert torch.equal(whole.setdefault(name, joint), joint), f"tied copies of {name} differ"
    return whole


def _save(folder: Path, layout: str, optimizer: str, further: int) -> tuple[Held, list[float]]:
    with start(LAYOUTS[layout][1], timeout_s=200) as ranks:
        replica = build(LAYOUTS[layout][1], optimizer, ranks, seed=3)
        train(replica, range(SAVED_AT), optimizer)
        keeper = Checkpointer(folder / layout, ranks)
        keeper.write(keeper.stage(SAVED_AT, replica.models, replica.optimizer, {"saved in": layout}))
        return held(replica), train(replica, range(SAVED_AT, SAVED_AT + further), optimizer)


def _load(folder: Path, saved: list[str], layout: str, optimizer: str, further: int) -> list[tuple[Held, list[float]]]:
    with start(LAYOUTS[layout][1], timeout_s=200) as ranks:
        replica = build(
            LAYOUTS[layout][1], optimizer, ranks, seed=4
        )  # other weights, so that loading must replace them
        results = []
        train(replica, range(50, 51), optimizer)  # and other states
        for one in saved:
            keeper = Checkpointer(folder / one, ranks)
            found, _ = keeper.find()
            assert found is not None
            assert found.manifest.extra == {"saved in": one}
            keeper.load(found, replica.models, replica.optimizer)
            before = held(replica)
            results.append((before, train(replica, range(SAVED_AT, SAVED_AT + further), optimizer)))
        return results


@dataclass
class State:
    """A run at step SAVED_AT, and the losses of the steps that follow."""

    tensors: Tensors
    counters: dict[str, dict[str, int]]
    losses: list[float]


def _state(results: list[tuple[Held, list[float]]]) -> State:
    counters = {name: group for rank, _ in results for name, group in rank.counters.items()}
    assert all(group == counters[name] for rank, _ in results for name, group in rank.counters.items())
    assert all(losses == results[0][1] for _, losses in results)
    return State(joined([rank for rank, _ in results]), counters, results[0][1])


def save(folder: Path, layout: str, optimizer: str, further: int = 5) -> State:
    """Train SAVED_AT steps, save in `folder/layout`, go on for `further` steps."""
    world = LAYOUTS[layout][0]
    return _state(run_ranks(_save, world, folder, layout, optimizer, further, timeout=220))


def load(folder: Path, saved: list[str], layout: str, optimizer: str, further: int = 5) -> dict[str, State]:
    """Load what each layout of `saved` left in `folder`, and go on for `further` steps."""
    by_rank = run_ranks(
        _load, LAYOUTS[layout][0], folder, saved, layout, optimizer, further, timeout=220 + 40 * len(saved)
    )
    return {one: _state([results[number] for results in by_rank]) for number, one in enumerate(saved)}
