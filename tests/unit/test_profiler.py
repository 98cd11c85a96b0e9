"""`train.profile`: which steps are recorded, what is written, and whose time is whose."""

import gzip
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import named
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from hope.model import Model, next_token_loss
from hope.train.config import TrainConfig
from hope.train.profiler import StepProfiler, _seen, time_by_kernel, time_by_module

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"steps": 8, "seq_len": 16, "global_batch": 1, "micro_batch": 1}


@pytest.mark.parametrize("steps", [[], [3], [1, 2, 3], [0, 2], [3, 2], [2, 9], [-1, 1]])
def test_a_bad_range_is_refused_by_name(steps):
    [problem] = TrainConfig(**SIZES, profile=steps).problems()
    assert problem.path == "train.profile"
    assert str(steps) in problem.what


def test_good_ranges_are_not():
    for steps in (None, [1, 1], [2, 8]):
        assert list(TrainConfig(**SIZES, profile=steps).problems()) == []


def run(path: str, *flags: str) -> int:
    torch.set_num_threads(1)
    return pretrain_hope.main([path, "train.steps=4", *flags])


def trace(path: Path) -> list[dict]:
    return json.loads(gzip.open(path).read())["traceEvents"]


def test_a_run_writes_one_trace_and_says_where_the_time_went(tmp_path, capfd):
    """Of the steps asked for: forward passes of the model are counted in the trace. The numbers are a plain run's."""
    path, folder = config_file(tmp_path, "attention"), tmp_path / "runs"
    more = ["train.profile=[2,3]", "train.micro_batch=8"]  # one micro-batch per step
    assert run_ranks(run, 1, path, *more, timeout=120) == [0]
    said = capfd.readouterr().out
    [written] = (folder / "tiny" / "profile").iterdir()
    assert written.name == "step_2_3.rank0.json.gz"
    norms = [event for event in trace(written) if event["name"] == "module::norm"]
    assert len(norms) == 2
    table = said[said.index("module  ") :].split("\nprofile of steps 2 to 3: ")[0].splitlines()
    assert {"blocks.*.mixer", "blocks.*.cms.levels.*.mlp.gate"} <= {line.split()[0] for line in table}
    shares = [float(line.split()[-1].rstrip("%")) for line in table[1:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    curve = lambda name: [
        json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    assert run_ranks(run, 1, path, "run.name=plain", "train.micro_batch=8", timeout=120) == [0]
    assert curve("tiny") == curve("plain")
    assert not (folder / "plain" / "profile").exists()


def test_a_run_that_ends_early_keeps_what_it_recorded(tmp_path):
    recorder = StepProfiler([2, 9], [torch.nn.Linear(2, 2)], tmp_path, torch.device("cpu"), keeps=True)
    for step in (1, 2, 3):
        with recorder.step(step):
            torch.ones(2).sum()
    recorder.close()
    assert [f.name for f in tmp_path.iterdir()] == ["step_2_3.rank0.json.gz"]
    assert len(list(recorder.told())) == 2
    recorder.close()
    assert list(recorder.told()) == []


def test_a_step_that_fails_is_not_recorded_and_hides_no_error(tmp_path):
    recorder = StepProfiler([1, 2], [torch.nn.Linear(2, 2)], tmp_path, torch.device("cpu"), keeps=True)

    def fails() -> None:
        with recorder.step(1):
            torch.ones(2).sum()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    recorder.close()
    assert list(tmp_path.iterdir()) == list(recorder.told()) == []


def test_other_ranks_record_nothing(tmp_path):
    recorder = StepProfiler([1, 2], [torch.nn.Linear(2, 2)], tmp_path, torch.device("cpu"), keeps=False)
    for step in (1, 2):
        with recorder.step(step):
            torch.ones(2).sum()
    recorder.close()
    assert list(tmp_path.iterdir()) == list(recorder.told()) == []


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = StepProfiler([1, 1], [torch.nn.Linear(2, 2)], tmp_path / "file", torch.device("cpu"), keeps=True)
    with recorder.step(1):
        pass
    assert "cannot be written" in list(recorder.told())[-1]


class Slow(torch.autograd.Function):
    """Works in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        torch.linalg.svd(torch.ones(400, 400))  # much longer than a pause of a busy machine
        return dx


def test_time_of_a_backward_pass_is_of_the_module_whose_forward_pass_it_was(tmp_path, monkeypatch):
    model = Model(named("transformer", vocab_size=16, width=8, layers=2, heads=2)).initialise(0)
    module = model.blocks["1"].mixer.output
    inner = module.forward
    monkeypatch.setattr(module, "forward", lambda x: Slow.apply(inner(x)))
    ids = torch.zeros(5, 2, dtype=torch.long)
    recorder = StepProfiler([2, 2], [model], tmp_path, torch.device("cpu"), keeps=True)
    for step in (1, 2):
        with recorder.step(step):
            next_token_loss(model(ids[:-1])[0], ids[1:]).backward()
    lines = next(recorder.told()).splitlines()[1:-1]
    backward = {line.split()[0]: float(line.split()[-2]) for line in lines}
    assert max(backward, key=backward.get) == "blocks.*.mixer.output"
    assert sum(backward.values()) < 2 * backward["blocks.*.mixer.output"]
    assert not model.blocks["1"].mixer._forward_hooks


class Counting(torch.nn.Module):
    """Its last operation has no backward pass: torch gives it the number of the next one that has."""

    def forward(self, x):
        y = 2 * x
        _ = y > 0
        return y


class Working(torch.nn.Module):
    def forward(self, x):
        return Slow.apply(x)


def test_an_operation_without_a_backward_pass_takes_no_ones_time(tmp_path):
    model = torch.nn.ModuleDict({"counting": Counting(), "working": Working()})
    x = torch.ones(3, requires_grad=True)
    recorder = StepProfiler([1, 1], [model], tmp_path, torch.device("cpu"), keeps=True)
    with recorder.step(1):
        model["working"](model["counting"](x)).sum().backward()
    lines = {line.split()[0]: line.split() for line in next(recorder.told()).splitlines()[1:-1]}
    assert float(lines["working"][-2]) > 10 * float(lines["counting"][-2])


def test_threads_count_their_operations_apart():
    """On a GPU the backward pass has a thread of its own, which computes forward passes again."""

    def event(name, thread, number, parent=None, forward=0, spent=0.0):
        when = SimpleNamespace(start=next(clock))
        return SimpleNamespace(
            name=name, thread=thread, time_range=when, sequence_nr=number, cpu_parent=parent, fwd_thread=forward,
            device_type=torch.autograd.DeviceType.CPU, self_cpu_time_total=1000 * spent, self_device_time_total=0.0,
        )  # fmt: skip

    clock = iter(range(9))
    before, first, after = (event(f"module::{name}", thread, -1) for name, thread in (("b", 2), ("a", 1), ("c", 2)))
    operations = [event("aten::mm", module.thread, 5, module) for module in (before, first, after)]
    node = event("autograd::engine::evaluate_function: MmBackward0", 2, 5, forward=1, spent=7.0)
    events = [before, first, after, *operations, node]
    lines = time_by_module(SimpleNamespace(events=lambda: events), 1, "cpu").splitlines()
    assert lines[1].split()[:3] == ["a", "0.000", "7.000"]


def test_the_benchmark_prints_the_same_table_and_is_not_in_the_way_of_pythons_module(tmp_path, monkeypatch, capfd):
    path = config_file(tmp_path, "attention")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "profile", raising=False)
    found = importlib.import_module("profile")
    assert callable(found.Profile)
    assert not Path(found.__file__).is_relative_to(BENCHMARKS)
    clocks = ["model.cms.unit=tokens", "model.cms.periods=[128,256]"]
    flags = [path, *clocks, "--warm", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    assert run_ranks(benchmark, 1, flags, timeout=120) == [0]
    assert "blocks.*.mixer" in capfd.readouterr().out
    assert (tmp_path / "out" / "step_2_2.rank0.json.gz").exists()


def benchmark(flags: list[str]) -> int:
    torch.set_num_threads(1)
    return runpy.run_path(str(BENCHMARKS / "profile.py"))["main"](flags)


def test_nothing_inside_a_block_that_is_compiled_as_a_whole_is_hooked():
    model = Model(named("transformer", vocab_size=32, width=16, layers=2, heads=2))
    model.blocks["0"].whole = lambda x: x
    names = [name for name, _ in _seen(model)]
    assert "blocks.0" in names
    assert "blocks.1.mixer.query" in names
    assert [name for name in names if name.startswith("blocks.0.")] == []


def test_kernels_by_their_time():
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    of = lambda key, device, time, count: SimpleNamespace(
        key=key, device_type=device, self_device_time_total=time, count=count
    )
    averages = [of("short", gpu, 1000.0, 2), of("aten::mm", cpu, 4000.0, 8), of("a  long\none", gpu, 3000.0, 6)]
    table = [line.split() for line in time_by_kernel(averages, steps=2).splitlines()]
    assert table[1] == ["a", "long", "one", "3", "1.500", "75.0%"]
    assert table[2] == ["short", "1", "0.500", "25.0%"]
    assert table[3][-2:] == ["2.000", "100.0%"]
    assert len(time_by_kernel(averages, 2, most=1).splitlines()) == 3
