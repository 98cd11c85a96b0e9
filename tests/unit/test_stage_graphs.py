"""`train.cuda_graphs` under a pipeline: a step of stages whose passes are recorded is the step, to the last bit.

Without a GPU a stand-in for a recording runs the pass itself at every call. It reads what a recording would read, and
leaves its results where it left the first ones. What mixers have collected in the pass, Python does not see.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import named
from multirank import run_ranks
from torch import Tensor

from hope.batch import Batch
from hope.config import CmsConfig
from hope.memory.config import MemoryConfig
from hope.mixers import Mixer, Report
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.train.diagnostics import MixerProbe
from parallel.compute.recording import Recorder
from parallel.compute.replica import Replica, build_replica
from parallel.compute.stage_graphs import StageGraphs
from parallel.layout.topology import ParallelConfig
from parallel.start import groups

COUNT, STEPS, WATCHED = 4, 8, (3, 5, 7)
REPEATED = STEPS - 2  # but for the first, and the first that is watched
GPU = torch.cuda.is_available()
LENGTH, MEMORY = (128, MemoryConfig()) if GPU else (32, MemoryConfig(projection_chunk=8, main_chunk=8))
MODEL = named("hope", memory=MEMORY, vocab_size=64, width=64, layers=5, heads=2, cms=CmsConfig(periods=[1, 2]))
PP2, INTERLEAVED = ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)
SLOTS = {1: [2, 1], 2: [4 + 2, 3 + 1]}
"""For one and for two chunks on a rank, by stage: micro-batches that a chunk holds at once, summed over the chunks."""
TP2_INTERLEAVED = dataclasses.replace(INTERLEAVED, tensor=2, sequence=True)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def name(value: object) -> str:
    if not isinstance(value, ParallelConfig):
        return str(value)
    return f"tp{value.tensor}-pp{value.pipeline}x{value.virtual_pipeline}"


def mapped(value: Any, change) -> Any:
    """`value` with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Report):
        return Report(mapped(value.scalars, change), mapped(value.histograms, change))
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    assert value is None
    return None


def leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


class Rerun(Recorder):
    """In the place of CUDA graphs."""

    def __init__(self, models):
        super().__init__(torch.device("cpu"))
        self.log: Counter[str] = Counter()
        self._mixers = [module for model in models for module in model.modules() if isinstance(module, Mixer)]

    def wait(self):
        self.log["wait"] += 1

    def free(self):
        self.log["free"] += 1

    def pool(self):
        self.log["pool"] += 1

    def record(self, work, pool):
        self.log["record"] += 1
        memory: list[Any] = []

        def replay():
            self.log["replay"] += 1
            before = [mixer.collected for mixer in self._mixers]
            with torch.enable_grad():  # autograd calls a function without
                found = work()
            for mixer, collected in zip(self._mixers, before, strict=True):
                mixer.collected = collected
            if not memory:
                memory.append(mapped(found, torch.clone))
            for mine, new in zip(leaves(memory[0]), leaves(found), strict=True):
                mine.copy_(new)
            return memory[0]

        return replay


def micro_batches(step: int, device: torch.device) -> list[Batch]:
    """Of a step, with weights of targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 64, (COUNT, LENGTH, 2), generator=generator)
    return [Batch(row, row.roll(-1, 0), None, torch.rand(LENGTH, 2, generator=generator)).to(device) for row in ids]


def steps_of(replica: Replica, ranks: groups.Ranks) -> Iterator[dict[str, Any]]:
    """What every step says of itself: losses, gradients before the update, and what mixers report when watched."""
    probe = MixerProbe(replica.models)
    for step in range(STEPS):
        probe.arm(step in WATCHED)
        reports = replica.run(micro_batches(step, ranks.device))
        replica.reduce()
        pieces = replica.optimizer.gradient_pieces()
        yield {
            "losses": [report["loss"].item() for report in reports],
            "norms": replica.optimizer.grad_norms(),
            "gradients": {(name, offset): values.cpu().clone() for name, offset, values in pieces},
            "collected": (probe.scalars(), {n: v.cpu().clone() for n, v in probe.histograms()})
            if step in WATCHED
            else None,
        }
        replica.optimizer.set_lr(1e-2)
        replica.optimizer.step()


def trained(
    layout: ParallelConfig, how: str, precision: str = "bf16", optim: str = "dmgd", recompute: str = "none"
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, int]]:
    """(every step, weights at the end, what was asked of a stand-in) of this rank; how: eager, stand-in or graphs."""
    torch.use_deterministic_algorithms(True)
    with groups.start(layout, timeout_s=60) as ranks:
        replica = build_replica(
            MODEL, OptimConfig(name=optim), layout, ranks, seq_len=LENGTH, precision=precision, seed=1,
            recompute=recompute, cuda_graphs=how == "graphs",
        )  # fmt: skip
        recorder = Rerun(replica.models)
        if how == "stand-in":
            replica = dataclasses.replace(replica, graphs=StageGraphs(replica.stage_step, recorder))
        found = list(steps_of(replica, ranks))
        weights = {name: p.detach().cpu() for model in replica.models for name, p in model.named_parameters()}
        evaluated = replica.run(micro_batches(STEPS, ranks.device), forward_only=True)
        found.append({"losses": [report["loss"].item() for report in evaluated]})
        replica.close()
        return found, weights, dict(recorder.log)


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{where} {number}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def assert_did_something(steps: list[list[dict[str, Any]]]) -> None:
    """Of all ranks: equal zeros would be equal as well."""
    for found in steps:
        assert len(found) == STEPS + 1
        assert all(any(values.any() for values in step["gradients"].values()) for step in found[:-1])
        assert all(step["collected"][0] for number, step in enumerate(found[:-1]) if number in WATCHED)
    losses = [step["losses"] for step in steps[-1]]
    assert len({loss for step in losses for loss in step}) == COUNT * (STEPS + 1)
    assert all(step["losses"] == [] for step in steps[0])


@pytest.mark.skipif(GPU, reason="a GPU is here")
@pytest.mark.parametrize(
    ("layout", "precision", "recompute"),
    [
        (PP2, "bf16", "none"),
        slow(PP2, "fp32", "none"),
        (INTERLEAVED, "bf16", "none"),
        slow(INTERLEAVED, "fp32", "none"),
        slow(INTERLEAVED, "bf16", "block"),
        slow(TP2_INTERLEAVED, "bf16", "none"),
    ],
    ids=name,
)
def test_slots_repeat_the_passes_to_the_last_bit(layout, precision, recompute):
    """Steps as they are and in slots, mixers watched and not; and evaluation after them."""
    world = layout.tensor * layout.pipeline
    expected = run_ranks(trained, world, layout, "eager", precision, "dmgd", recompute, timeout=110)
    found = run_ranks(trained, world, layout, "stand-in", precision, "dmgd", recompute, timeout=110)
    assert_did_something([steps for steps, _, _ in expected])
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_equal(mine[:2], theirs[:2], f"rank {rank}")
        assert theirs[2] == {}
        slots = SLOTS[layout.virtual_pipeline][rank // layout.tensor]
        # recorded in step 1; closed in 3, recorded again in 4; watched, in the same slots, in 5; closed at the end
        assert mine[2] == {
            "wait": 4, "free": 4, "pool": 2 * slots, "record": 6 * slots,
            "replay": 2 * REPEATED * COUNT * layout.virtual_pipeline,
        }  # fmt: skip


@pytest.mark.skipif(GPU, reason="a GPU is here")
def test_what_is_recorded_and_when():
    """On one chunk that is the whole model, by a schedule of two forward passes and then two backward passes."""
    model = Model(MODEL).initialise(1)

    def step_fn(model, hidden, batch):
        loss = model(batch.tokens_TB)[0].float().logsumexp(-1).mean()
        return loss, {"loss": loss}

    recorder = Rerun([model])
    graphs = StageGraphs(step_fn, recorder)

    def scheduled(step, batches, broken=False):
        losses, reports = zip(*(step(model, None, batch) for batch in batches), strict=True)
        if broken:
            raise RuntimeError("between the passes")
        for loss in losses:
            loss.backward()
        return list(reports)

    def done(length=8, count=2, broken=False, **marks) -> dict[str, int]:
        recorder.log.clear()
        ids = torch.arange(length * count * 2).view(count, length, 2) % 64
        batches = [Batch(row, row, **marks) for row in ids]
        reports = graphs.run([model], batches, lambda step: scheduled(step, batches, broken))
        assert [r["loss"] for r in reports] == [step_fn(model, None, batch)[0] for batch in batches]
        return dict(recorder.log)

    ready, passes = {"wait": 1, "free": 1}, {"pool": 2, "record": 4, "replay": 4}
    assert done() == {}
    assert done() == ready | passes
    assert done() == {"replay": 4}
    with pytest.raises(RuntimeError, match="between the passes"):
        done(broken=True)
    assert done() == {"replay": 4}  # slots of passes that never ended are free again
    assert done(length=4) == ready  # given back before a step as it is
    assert done(length=4) == ready | passes
    assert done() == {"wait": 2, "free": 2} | passes  # it was seen, and the slots are of another shape
    assert done(count=1) == ready
    assert done(count=1) == ready | {"pool": 1, "record": 2, "replay": 2}
    marks = {"starts_TB": torch.zeros(8, 2, dtype=torch.bool)}
    assert [done(**marks) for _ in range(3)] == [ready, {}, {}]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize(
    ("layout", "optim", "recompute"),
    [
        (PP2, "dmgd", "none"),
        (PP2, "muon", "block"),
        (INTERLEAVED, "dmgd", "mlp"),
        (INTERLEAVED, "muon", "none"),
        pytest.param(
            TP2_INTERLEAVED, "dmgd", "none",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 4, reason="fewer than four CUDA devices"),
        ),
    ],
    ids=name,
)  # fmt: skip
def test_graphs_of_stages_repeat_the_passes_to_the_last_bit(layout, optim, recompute, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    world = layout.tensor * layout.pipeline
    expected = run_ranks(trained, world, layout, "eager", "bf16", optim, recompute, timeout=110)
    found = run_ranks(trained, world, layout, "graphs", "bf16", optim, recompute, timeout=110)
    assert_did_something([steps for steps, _, _ in expected])
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_equal(mine[:2], theirs[:2], f"rank {rank}")
