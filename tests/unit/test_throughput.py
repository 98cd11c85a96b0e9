"""benchmarks/throughput.py: equal models, turns, the search for a micro-batch, and what it writes."""

import contextlib
import functools
import gc
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from multirank import run_ranks

from hope import dense
from parallel.layout.topology import ParallelConfig
from parallel.start import groups

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("throughput"), importlib.import_module("contestants")


@pytest.mark.parametrize("size", ["17m", "760m"])
def test_models_of_a_size_have_the_parameters_of_its_transformer(bench, size):
    _, contestants = bench
    wanted = contestants.parameters(contestants.model_config("transformer", size))
    for name in contestants.PATTERNS:
        assert contestants.parameters(contestants.model_config(name, size)) == pytest.approx(wanted, rel=0.02)


def test_choices_are_matched_too_and_written_down(bench):
    throughput, contestants = bench
    args = throughput.arguments(["--size", "17m", "--heads", "3", "--hope", "static=projected", "eta_max=0.125"])
    made = throughput.Bench.__new__(throughput.Bench)
    made.args, made.gpu = args, "cpu"
    wanted = contestants.parameters(contestants.model_config("transformer", "17m"))
    assert contestants.parameters(made.config("hope")) == pytest.approx(wanted, rel=0.02)
    assert made.config("hope").mixers["hope"].static == "projected"
    row = made.measured("hope", 1024)
    assert (row["heads"], row["hope"]) == (3, {"static": "projected", "eta_max": 0.125})
    row = made.measured("transformer", 1024)
    assert (row["heads"], row["hope"]) == (6, {})


def run(flags: list[str]) -> int:
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True  # megatron-core compiles its activation, which not every CPU's arithmetic can
    return importlib.import_module("throughput").main(flags)


def test_turns_rows_and_table(bench, tmp_path, capfd):
    file, models = tmp_path / "rows.json", ["transformer", "hope", "megatron_gpt"]
    flags = ["--size", "tiny", "--seq", "64", "--tokens", "128", "--precision", "fp32", "--rounds", "2", "--steps", "1"]
    assert run_ranks(run, 1, [*flags, "--models", *models, "--json", str(file)], timeout=120) == [0]
    said = capfd.readouterr().out.splitlines()
    turns = [line.split()[2].rstrip(":") for line in said if line.startswith("  round")]
    assert turns == 2 * models
    rows = json.loads(file.read_text())
    assert [row["model"] for row in rows] == models
    for row in rows:
        assert row["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.02)
        assert 0 < row["smallest"] <= row["tokens_per_s"] <= row["largest"]
        assert (row["seq"], row["tokens_per_step"], row["gpu"], row["peak_gib"]) == (64, 128, "cpu", None)
        assert row["micro_batch"] in (1, 2)
    assert any(line.startswith("| hope | 0.0M | 64 |") for line in said)
    other = [{**rows[1], "seq": 128}, {**rows[1], "recompute": "block"}, {**rows[1], "tokens_per_step": 256}]
    again = [{**rows[1], "tokens_per_s": 1.0}, *other]
    importlib.import_module("throughput").write(file, again)  # of one measurement the newest stays
    assert json.loads(file.read_text()) == [rows[0], rows[2], *again]


def test_one_that_fails_makes_place_for_its_measurement(bench, tmp_path):
    throughput, file = bench[0], tmp_path / "rows.json"
    args = bench[0].arguments(["--size", "tiny", "--seq", "64", "--tokens", "64"])
    made = throughput.Bench.__new__(throughput.Bench)
    made.args, made.gpu = args, "cpu"
    failed = throughput._failed(made, "hope", 64, ValueError("does not fit"))
    assert failed["not_compared"] == "ValueError: does not fit"
    throughput.write(file, [failed])
    throughput.write(file, rows := [{**made.measured("hope", 64), "tokens_per_s": 1.0}])
    assert json.loads(file.read_text()) == rows


def test_a_kernel_is_counted_once_in_the_share_of_the_loop(bench):
    """As torch averages them: operations of the CPU with the time of what they launched, and the kernels themselves."""
    of = lambda key, device, total, own: SimpleNamespace(
        key=key, device_type=device, device_time_total=total, self_device_time_total=own
    )
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        of("forward", cpu, 100.0, 0.0), of("hope::memory_loop", cpu, 25.0, 25.0), of("aten::mm", cpu, 75.0, 75.0),
        of("_sequential", gpu, 20.0, 20.0), of("_outputs", gpu, 5.0, 5.0), of("sm90_gemm", gpu, 75.0, 75.0),
    ]  # fmt: skip
    assert bench[0].loop_share(events) == 0.25
    assert bench[0].loop_share(events[-1:]) is None


def kept(model: str, compile: str) -> int:
    """How many more numbers are in tensors after a turn than after the turn before it."""
    torch.set_num_threads(1)
    dense.Compiled = functools.partial(dense.Compiled, "aot_eager")
    throughput = importlib.import_module("throughput")
    args = throughput.arguments(["--size", "tiny", "--seq", "64", "--tokens", "128", "--compile", compile])
    numbers = lambda: sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    with groups.start(ParallelConfig()) as ranks:
        found, bench = [], throughput.Bench(args, ranks)
        for _ in range(2):
            parameters = bench.turn(model, 64, 1, 1)["parameters"]
            bench.free()
            found.append(numbers())
        assert parameters > 10_000
        return found[1] - found[0]


@pytest.mark.parametrize(("model", "compile"), [("transformer", "none"), ("hope", "dense")])
def test_every_turn_has_the_whole_memory(bench, model, compile):
    assert run_ranks(kept, 1, model, compile, timeout=120) == [0]


class Search:
    """The search for a micro-batch of 16 sequences, where those in `fits` fit and take so long."""

    def __init__(self, throughput, fits: dict[int, float], cap: float = 1.0, tell: list[int] | None = None) -> None:
        self.tried: list[int] = []
        self.built: list[int] = []  # by how many tries stood before
        made = throughput.Bench.__new__(throughput.Bench)
        made.args = SimpleNamespace(tokens=16 * 64, cap=cap, compile="none", micro_batch=tell or [])

        def timed(one, seq, micro, steps, warm):
            assert one == self.built[-1]
            self.tried.append(micro)
            if micro not in fits:
                raise torch.OutOfMemoryError
            return {"seconds": [fits[micro]]}

        @contextlib.contextmanager
        def built(model, seq):
            self.built.append(len(self.tried))
            yield self.built[-1]

        made.timed, made.built, made.free = timed, built, lambda: None
        made.predicted = lambda model, seq, micro: 0.5 * micro
        self.found = made.micro_batch("hope", 64)


def test_the_micro_batch_is_the_faster_of_the_two_largest_that_fit(bench):
    throughput, _ = bench
    result = lambda *args, **choices: vars(Search(throughput, *args, **choices))
    assert result({4: 1.0, 2: 0.9, 1: 0.1}, cap=3.2) == {"tried": [8, 4, 2], "built": [0, 1], "found": 2}
    assert result({4: 1.0, 2: 1.1, 1: 0.1}, cap=10) == {"tried": [16, 8, 4, 2], "built": [0, 1, 2], "found": 4}
    assert result({1: 1.0}, cap=10)["tried"] == [16, 8, 4, 2, 1]
    assert result({2: 1.0, 1: 1.1}, cap=0.8) == {"tried": [2, 1], "built": [0], "found": 2}
    with pytest.raises(ValueError, match="one sequence does not fit under 10 GiB"):
        result({}, cap=10)


def test_micro_batches_that_are_given_are_not_searched_for(bench):
    throughput, _ = bench
    assert vars(Search(throughput, {4: 1.0, 2: 0.9}, tell=[2, 4])) == {"tried": [4, 2], "built": [0], "found": 2}
    assert vars(Search(throughput, {}, tell=[8])) == {"tried": [], "built": [], "found": 8}  # its turns will tell


def test_lengths_that_do_not_divide_the_tokens_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench[0].arguments(["--seq", "3000"])
    assert "--seq 3000 does not divide --tokens 131072" in capsys.readouterr().err


def test_micro_batches_that_do_not_divide_the_sequences_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench[0].arguments(["--seq", "4096", "--micro-batch", "8", "3"])
    assert "--micro-batch 3 does not divide the 32 sequences of 4096" in capsys.readouterr().err
