"""benchmarks/scale.py: one group of processes in one layout after another."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from multirank import run_ranks
from tiny import config_file

from configs.schema import load
from parallel.layout.topology import ParallelConfig
from parallel.referee.evidence import from_layout
from parallel.referee.parity import make_task
from parallel.start import groups

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYOUTS = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(), ParallelConfig(tensor=2)]


def losses(path: str, layout: ParallelConfig, ranks: groups.Ranks) -> list[float] | None:
    referee = importlib.import_module("parallel.referee.parity")
    config = dataclasses.replace(load(path, [], check=False), parallel=layout)
    task = make_task(config, 3)
    replica = referee.build_replica(
        task.model, task.optim, layout, ranks, seq_len=config.train.seq_len, precision="fp32", seed=task.seed
    )
    found = from_layout(task, replica, 2)
    return None if found is None else [*found.losses, *found.grad_norms]


def one_after_another(path: str, layouts: list[ParallelConfig]) -> list[list[float] | None]:
    with groups.start(ParallelConfig(), timeout_s=60) as ranks:
        return [losses(path, layout, groups.in_another_layout(layout, ranks)) for layout in layouts]


def afresh(path: str, layout: ParallelConfig) -> list[float] | None:
    with groups.start(layout, timeout_s=60) as ranks:
        return losses(path, layout, ranks)


@pytest.mark.slow
def test_a_layout_is_the_same_after_others(tmp_path):
    """To the last bit that of processes which never knew another."""
    path = config_file(tmp_path)
    found = run_ranks(one_after_another, 2, path, LAYOUTS, timeout=120)[0]
    for layout, numbers in zip(LAYOUTS[:3], found, strict=False):
        assert numbers == run_ranks(afresh, 2, path, layout)[0], layout
    assert found[3] == found[0]
    assert found[1] != found[0]  # another order of sums: else this says nothing


@pytest.mark.slow
def test_scale_measures_the_cells_of_a_grid(tmp_path, monkeypatch, capsys):
    """Also after one that cannot run on its devices; with what is left out said."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    facts = {"name": "grid", "config": config_file(tmp_path), "where": "local", "nodes": [1, 2, 4], "scaling": "weak",
             "layouts": [{}, {"tensor": 2}], "variants": [{"name": "hope"}]}  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(facts))
    flags = ["--devices", "1", "2", "--steps", "1", "--json", str(tmp_path / "scale.json")]
    assert scale.main([str(tmp_path / "grid.yaml"), *flags, "--set", "train.precision=fp32"]) == 0
    rows = json.loads((tmp_path / "scale.json").read_text())
    assert [(r["cell"], r["gpus"], r["global_batch"], r["gpu"]) for r in rows] == [
        ("n1_dp_hope", 1, 8, "cpu"), ("n2_dp_hope", 2, 16, "cpu"), ("n2_tp2_hope", 2, 16, "cpu")]  # fmt: skip
    assert {(r["cuda_graphs"], r["compile"], r["recompute"]) for r in rows} == {(False, "none", "none")}
    assert all(r["tokens_per_s"] == pytest.approx(r["global_batch"] * 16 / r["seconds"][1]) for r in rows)
    assert "left out" in capsys.readouterr().out


def test_scale_refuses_a_pattern_of_no_cell(tmp_path, monkeypatch, capsys):
    """Before anything is started: no row would say that it was meant."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale = importlib.import_module("scale")
    facts = {"name": "grid", "config": config_file(tmp_path), "where": "local", "nodes": [1, 2]}
    (tmp_path / "grid.yaml").write_text(json.dumps(facts))
    monkeypatch.setattr(scale, "torchrun", lambda *_: pytest.fail("started"))
    assert scale.main([str(tmp_path / "grid.yaml"), "--devices", "2", "--only", "n2_dp", "n1_dp"]) == 2
    assert "n1_dp is the name of no cell" in capsys.readouterr().err
