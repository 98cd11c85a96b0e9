"""benchmarks/continual.py: what a cell is given, what is kept of a run, the tables, and whole runs at tiny size."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import yaml
from tiny import config_file, token_set

from configs.schema import validate_without_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SOURCES = [(name, f"{name}/train", f"{name}/heldout") for name in ("x", "y")]
PLAN = {
    "models": {"a": [], "b": []},
    "optimizers": {"muon": {"set": [], "lr": [1.0], "lr_elementwise": [3.0]}},
    "order": [["muon", "a"], ["muon", "b"]],
    "seeds": [1, 2],
}


@pytest.fixture
def continual(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("continual")


def row(model: str, seed: int, heldout: float | None, **more) -> dict:
    rates = {"optimizer": "muon", "lr": 1.0, "lr_elementwise": 3.0, "parameters": 1_500_000}
    return {"model": model, "seed": seed, "heldout": heldout, "sources": ["x", "y"], **rates, **more}


def runs(continual, tmp_path: Path):
    args = argparse.Namespace(json=tmp_path / "rows.json", source=SOURCES, out="runs", seconds=9)
    return continual.Phases(PLAN, args)


def test_a_row_has_the_matrix_and_the_measures_of_the_end(continual, tmp_path):
    of = lambda x, y: {"continual.loss.x": x, "continual.loss.y": y, "heldout_loss": (x + y) / 2}
    records = [
        {"step": 0, "phase": 0, **of(6.0, 6.0)},
        {"step": 1, "loss": 5.0},
        {"step": 2, "phase": 1, **of(4.0, 5.5)},
        {"step": 4, "phase": 2, **of(5.0, 3.0), "continual.forgetting": 1.0, "continual.forgetting.x": 1.0},
    ]
    found = runs(continual, tmp_path).measured(records, False)
    assert found == {
        "heldout": 4.0, "sources": ["x", "y"], "matrix": [[6.0, 6.0], [4.0, 5.5], [5.0, 3.0]],
        "measures": {"forgetting": 1.0, "forgetting.x": 1.0},
    }  # fmt: skip
    assert runs(continual, tmp_path).measured(records[:2], True) == {"heldout": None, "sources": ["x", "y"]}
    with pytest.raises(RuntimeError, match="not 0 to 2"):
        runs(continual, tmp_path).measured(records[:3], False)


def test_the_tables_have_means_and_spreads_over_seeds(continual):
    matrix = [[6.0, 6.0], [4.0, 5.5], [5.0, 3.0]]
    other = [[6.0, 6.0], [4.2, 5.5], [5.2, 3.0]]
    rows = [
        row("a", 1, 4.0, matrix=matrix, measures={"forgetting": 1.0, "retained": 0.5}),
        row("a", 2, 4.1, matrix=other, measures={"forgetting": 2.0, "retained": 0.4}),
    ]
    lines = continual.table(PLAN, rows).splitlines()
    assert lines[2] == (
        "| muon | a | 1.5M | 1 | 3 | 2 | 4.050 (4.000 - 4.100) | 1.500 (1.000 - 2.000) | - | - | "
        "0.450 (0.400 - 0.500) |"
    )
    assert "| muon | b |" in lines[3]
    assert "0 of 1 cells run" in lines[3]
    assert lines[-2].endswith("| x | 6.000 (6.000 - 6.000) | 4.100 (4.000 - 4.200) | 5.100 (5.000 - 5.200) |")
    assert lines[-1].endswith("| y | 5.500 (5.500 - 5.500) | 3.000 (3.000 - 3.000) | 3.000 (3.000 - 3.000) |")
    assert "all diverged" in continual.table(PLAN, [row("b", 1, None)]).splitlines()[3]


@pytest.mark.parametrize("name", ["continual", pytest.param("continual_cpu", marks=pytest.mark.slow)])
def test_the_cells_of_the_plans_are_configurations_of_equal_size_whose_clocks_divide_phases(continual, tmp_path, name):
    plan = yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())
    three = [(name, f"{name}/t", f"{name}/h") for name in ("law", "code", "web")]
    args = argparse.Namespace(json=tmp_path / "rows.json", source=three, out="runs", seconds=9)
    periods = {}
    for optimizer, model in plan["order"]:
        cell = continual.recipe.grid(plan, optimizer, model)[0]
        config, _ = continual.recipe.config_of(plan, cell, continual.Phases(plan, args).words(cell))
        missing = validate_without_data(config, 1, plan["config"])  # all else is as it should be
        assert {problem.path.split("[")[0] for problem in missing} == {"data.sources"}
        assert [source.name for source in config.data.sources] == ["law", "code", "web"]
        assert config.data.sources[1].heldout == "code/h"
        assert (config.train.mode, config.data.train, config.train.total_steps % 3) == ("continual", "", 0)
        assert all(config.train.total_steps // 3 % period == 0 for period in config.model.periods)
        periods[model] = len(config.model.periods)
    clocks = {"transformer": 1, "hope_1_clock": 1, "hope_2_clocks": 2, "hope_4_clocks": 4, "hope_in_context": 2}
    assert periods == clocks


def test_rows_of_other_sources_and_too_few_sources_are_refused(continual, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row("a", 1, None)]))
    flags = [word for source in SOURCES[::-1] for word in ("--source", *source)]
    with pytest.raises(SystemExit):
        continual.main([*flags, "--json", str(rows)])
    assert "has rows of x, y, not of y, x: another --json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        continual.main([*flags[:4], "--json", str(rows)])
    assert "--source twice or more" in capsys.readouterr().err


def flags_of_tiny(tmp_path: Path) -> list[str]:
    plan = {
        "config": config_file(tmp_path, "attention"),
        "common": ["train.steps=6", "optim.decay=constant"],
        "models": {"transformer": ["model.cms.periods=[1]"], "two": ["model.cms.periods=[1,3]"]},
        "optimizers": {"adamw": {"set": ["optim.name=adamw"], "lr": [1e-2], "lr_elementwise": [1e-2]}},
        "order": [["adamw", "two"]],
        "seeds": [1, 2],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    words = ["--plan", str(tmp_path / "plan.yaml"), "--json", str(tmp_path / "rows.json")]
    for seed, name in enumerate("xyz"):
        token_set(tmp_path / f"train_{name}", 30, 10 + seed)
        token_set(tmp_path / f"heldout_{name}", 20, 20 + seed)
        words += ["--source", name, str(tmp_path / f"train_{name}"), str(tmp_path / f"heldout_{name}")]
    return [*words, "--out", str(tmp_path / "runs"), "--jobs", "2"]


def test_without_time_nothing_is_begun(continual, tmp_path, capsys):
    assert continual.main([*flags_of_tiny(tmp_path), "--seconds", "1"]) == 0
    assert "0 of 1 cells run" in capsys.readouterr().out
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.slow
def test_three_sources_are_learned_in_sequence_and_no_cell_is_run_twice(continual, tmp_path, capfd):
    flags, rows = flags_of_tiny(tmp_path), tmp_path / "rows.json"
    assert continual.main(flags) == 0
    found = json.loads(rows.read_text())
    assert [(r["model"], r["seed"], r["sources"]) for r in found] == [("two", seed, ["x", "y", "z"]) for seed in (1, 2)]
    for one in found:
        end = one["matrix"][-1]
        assert one["heldout"] == pytest.approx(sum(end) / 3)
        best_of_x = min(line[0] for line in one["matrix"])
        best_of_y = min(line[1] for line in one["matrix"])
        lost = [end[0] - best_of_x, end[1] - best_of_y]
        assert one["measures"]["forgetting"] == pytest.approx(sum(lost) / 2)
        assert one["matrix"][0] != end
    assert found[0]["matrix"] != found[1]["matrix"]
    assert "| adamw | two | x |" in capfd.readouterr().out
    before = rows.read_text()
    assert continual.main(flags) == 0
    assert rows.read_text() == before
    assert continual.main(["--table", str(rows), "--plan", str(tmp_path / "plan.yaml")]) == 0
    assert "| adamw | two | z |" in capfd.readouterr().out
