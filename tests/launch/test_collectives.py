"""Seconds of collectives in an estimate, and what a comparison with measured rows makes of them. No cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import Config, load
from launch import estimate, profile, scaling
from launch.__main__ import main
from launch.collectives import Bus, Collectives
from parallel.layout.topology import ParallelConfig

H100 = "NVIDIA H100 80GB HBM3"
WIDE = ["model.heads=8", "model.width=64", "train.precision=bf16"]


def collectives(config: Config, world: int, bus: Bus | None = None, **layout) -> Collectives:
    return Collectives.of(config, ParallelConfig(**layout), world, bus or Bus(100))


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4)])
def test_tensor_parallel_seconds_are_those_of_a_hand(tmp_path, precision, size):
    """Two blocks of attention and two levels: three regions each, an all-reduce of [16, 2, 16] forward and one backward
    for all; and one for the embedding forward and the head backward. Two micro-batches of each of two replicas."""
    config = load(config_file(tmp_path, "attention"), [f"train.precision={precision}", "train.recompute=none"])
    all_reduces = 2 * (2 * 3) + 2
    moved = 2 * (2 - 1) / 2 * 16 * 2 * 16 * size
    for sequence in (False, True):
        found = collectives(config, 4, tensor=2, sequence=sequence)
        assert found.tensor == pytest.approx(2 * all_reduces * moved / 100e9)


def test_recomputed_regions_gather_again(tmp_path):
    """`sublayer`: with sequence parallelism an all-gather, half an all-reduce, for each of six regions; its sum at the
    end is wanted by nobody. `block`: of three regions of a block the first two sum again."""
    config = load(config_file(tmp_path, "attention"), [])

    def seconds(recompute: str, sequence: bool) -> float:
        config.train.recompute = recompute  # "sublayer" is of the model, and of no run
        return collectives(config, 2, tensor=2, sequence=sequence).tensor

    unit = seconds("none", False) / 14
    assert seconds("sublayer", False) == pytest.approx(14 * unit)
    assert seconds("sublayer", True) == pytest.approx((14 + 6 / 2) * unit)
    assert seconds("block", False) == pytest.approx((14 + 4) * unit)
    assert seconds("block", True) == pytest.approx((14 + 6 / 2 + 4 / 2) * unit)
    assert seconds("memory", True) == pytest.approx((14 + 2 / 2) * unit)
    assert seconds("mlp", True) == pytest.approx((14 + 4 / 2) * unit)


def test_more_tensor_ranks_move_more_and_one_moves_nothing(tmp_path):
    config = load(config_file(tmp_path), WIDE)
    seconds = [collectives(config, 8, tensor=tensor).tensor for tensor in (1, 2, 4, 8)]
    assert seconds[0] == 0
    assert seconds == sorted(set(seconds))
    alone = collectives(config, 1)
    assert (alone.tensor, alone.data) == (0, 0)
    assert alone.step(2.0, 0.25) == 2.5


def test_gradients_and_weights_of_data_parallel_ranks(tmp_path):
    """fp32 gradients are reduce-scattered in every step; bf16 weights are gathered when they moved, every third step
    those of the slow level. Kept on their ranks, its gradients travel as rarely."""
    config = load(config_file(tmp_path), ["train.precision=bf16"])
    slow = 2 * (3 * 16 * config.model.hidden_per_level() + 16)
    fast = estimate.parameters(config) - slow
    found = collectives(config, 4)
    assert found.tensor == 0
    assert found.data == pytest.approx(3 / 4 * ((4 + 2) * fast + (4 + 2 / 3) * slow) / 100e9)
    config.optim.accumulate = "local"
    assert collectives(config, 4).data == pytest.approx(3 / 4 * (6 * fast + 6 / 3 * slow) / 100e9)


def test_ranks_on_other_nodes_have_the_network(tmp_path):
    config = load(config_file(tmp_path), WIDE)
    here, there = collectives(config, 8, Bus(100), tensor=4), collectives(config, 8, Bus(100, 10, 2), tensor=4)
    assert there.tensor == pytest.approx(10 * here.tensor)
    assert there.data == pytest.approx(20 * here.data)  # two groups leave a node of two ranks
    node = collectives(config, 8, Bus(100, 10, 4), tensor=4)
    assert (node.tensor, node.data) == (pytest.approx(here.tensor), pytest.approx(40 * here.data))
    assert collectives(config, 8, Bus(100, 0, 4), tensor=4).data == 0  # not known: no time, which the page says


def test_a_pipeline_waits_for_its_tensor_ranks_and_not_for_data(tmp_path):
    found = Collectives(tensor=2.0, data=5.0)
    assert found.step(10.0, 0.25) == pytest.approx(12 * 1.25 + 5)
    config = load(config_file(tmp_path, "attention"), [])
    whole, half = collectives(config, 2, tensor=2), collectives(config, 4, tensor=2, pipeline=2)
    assert half.tensor == pytest.approx(whole.tensor / 2)  # seven of fourteen all-reduces are on either stage


def test_the_page_of_estimate_says_what_collectives_rest_on(tmp_path):
    config = load(config_file(tmp_path, "attention"), [])
    page = lambda *words: estimate.describe(config, 2, profile.load("h100", list(words)), 1e6, None)
    assert "collectives 100 GB/s inside a node (site.bus_gb_s)\n" in page("bus_gb_s=100")
    assert "those between nodes not counted (site.network_gb_s 0)" in page("gpus_per_node=1")
    assert "40 GB/s between two" in page("gpus_per_node=1", "network_gb_s=40")


def test_layouts_are_listed_by_their_time(tmp_path):
    """On so slow a bus that of two ranks those win which send activations only, between stages."""
    config = load(config_file(tmp_path, "attention"), [])
    rows = estimate.layouts(config, 2, profile.load("h100", ["bus_gb_s=0.001"]))
    assert [row.layout.pipeline for row in rows] == [2, 1, 1]
    assert [row.step_s for row in rows] == sorted(row.step_s for row in rows)
    assert [row.collectives > 0.9 * row.step_s for row in rows] == [False, True, True]


@pytest.mark.parametrize("key", ["bus_gb_s", "network_gb_s"])
def test_a_bandwidth_below_nothing_is_refused(key):
    with pytest.raises(ConfigError) as caught:
        profile.load("h100", [f"{key}=-3"])
    [(path, what, _)] = caught.value.problems
    assert path == f"site.{key}"
    assert "-3 GB/s" in what


def made_up(folder: Path, *rows: dict) -> Path:
    """A file of rows of one configuration, 128 tokens per step at 1000 tokens/s a GPU unless a row says otherwise."""
    path, config = folder / "scale.json", config_file(folder, "attention")
    same = {"model": "made-up", "parameters": 1, "layout": "dp", "gpus": 1, "scaling": "weak", "seq": 16,
            "gpu": H100, "tokens_per_s_per_gpu": 1000.0, "config": config, "overrides": []}  # fmt: skip
    whole = [{**same, **row} for row in rows]
    path.write_text(json.dumps([{"tokens_per_s": r["tokens_per_s_per_gpu"] * r["gpus"], **r} for r in whole]))
    return path


RAN = {"cuda_graphs": True, "compile": "none", "recompute": "none"}


def test_compare_counts_collectives_at_the_bandwidth_that_is_given(tmp_path, capsys):
    """128 tokens in 64 ms on two GPUs at 1000 tokens/s, and 0.0573 MB in 10 ms of sums."""
    tensor = {**RAN, "gpus": 2, "layout": "tp2", "tokens_per_s_per_gpu": 800.0,
              "overrides": ["parallel.tensor=2", "train.precision=bf16", "train.recompute=none"]}  # fmt: skip
    path = made_up(tmp_path, RAN, tensor)
    moved = 4 * 14 * 16 * 2 * 16 * 2  # four micro-batches, fourteen all-reduces
    assert main(["compare", str(path), "--bus-gb-s", str(moved / 0.01 / 1e9)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| made-up | tp2 | 2 | weak | 0.074 | 0.080 | -7.5% | one GPU |"
    assert lines[3:] == ["1 steps, 0 of them more than 15% off"]


def test_rows_of_another_choice_are_not_compared(tmp_path, capsys):
    """The one GPU ran with graphs: it says nothing of rows without them, nor of one that does not say."""
    other, silent = {**RAN, "gpus": 2, "cuda_graphs": False}, {"gpus": 4}
    rows = scaling.with_efficiency(scaling.read(made_up(tmp_path, RAN, {**RAN, "gpus": 2}, other, silent)))
    assert [row["efficiency"] for row in rows] == [1, 1, None, None]
    assert main(["compare", str(made_up(tmp_path, RAN, other, silent))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[-1] for line in lines[2:4]} == {"launch/speeds.py |", "launch/speeds.py? |"}
    assert lines[-1] == "? 1 of them do not say all of cuda_graphs, compile, recompute: what they rest on may differ"


def test_silent_rows_are_compared_with_a_silent_one_and_marked(tmp_path, capsys):
    path = made_up(tmp_path, {}, {"gpus": 2, "tokens_per_s_per_gpu": 500.0})
    assert [row["efficiency"] for row in scaling.with_efficiency(scaling.read(path))] == [1, 0.5]
    assert main(["compare", str(path)]) == 0
    assert "| one GPU? |" in capsys.readouterr().out
