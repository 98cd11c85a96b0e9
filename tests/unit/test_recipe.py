"""benchmarks/recipe.py: which cells are run, in which order, what is kept, and the table."""

import argparse
import functools
import importlib
import json
from pathlib import Path

import pytest
import yaml
from tiny import config_file

from configs.schema import load, validate_without_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAN = {
    "models": {"a": [], "b": []},
    "optimizers": {"muon": {"set": [], "lr": [1.0, 2.0], "lr_elementwise": [3.0]}},
    "order": [["muon", "a"], ["muon", "b"]],
    "seeds": [1, 2],
}


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recipe")


def row(recipe, model: str, lr: float, seed: int, heldout: float | None) -> dict:
    return recipe.Cell(model, "muon", lr, 3.0, seed)._asdict() | {"heldout": heldout, "parameters": 1_500_000}


def test_the_best_of_a_complete_grid_gets_the_other_seeds(recipe):
    wanted = lambda rows: [(c.model, c.lr, c.seed) for c in recipe.cells(PLAN, rows)]
    grids = [("a", 1.0, 1), ("a", 2.0, 1), ("b", 1.0, 1), ("b", 2.0, 1)]
    assert wanted([]) == grids
    half = [row(recipe, "a", 1.0, 1, 4.0)]
    assert wanted(half) == grids
    whole = [*half, row(recipe, "a", 2.0, 1, 3.0)]
    assert wanted(whole) == [*grids[:2], ("a", 2.0, 2), *grids[2:]]
    diverged = [*half, row(recipe, "a", 2.0, 1, None)]
    assert wanted(diverged) == [*grids[:2], ("a", 1.0, 2), *grids[2:]]
    assert wanted([row(recipe, "a", lr, 1, None) for lr in (1.0, 2.0)]) == grids  # nothing to repeat


def test_rates_of_a_plan_are_the_best_of_shorter_runs(recipe):
    """One cell per model whose grid there is complete, then its other seeds; of the others none."""
    rows = [row(recipe, "a", 1.0, 1, 4.0), row(recipe, "a", 2.0, 1, 3.0), row(recipe, "b", 1.0, 1, 1.0)]
    tuned = recipe.tuned_rates(PLAN, rows)
    assert tuned == {("muon", "a"): (2.0, 3.0)}
    plan = {**PLAN, "optimizers": {"muon": {"set": []}}, "tuned": tuned}
    wanted = lambda rows: [(c.model, c.lr, c.lr_elementwise, c.seed) for c in recipe.cells(plan, rows)]
    assert wanted([]) == [("a", 2.0, 3.0, 1)]
    assert wanted([row(recipe, "a", 2.0, 1, 2.0)]) == [("a", 2.0, 3.0, 1), ("a", 2.0, 3.0, 2)]


def test_the_table_has_means_and_spreads_of_the_best(recipe):
    rows = [row(recipe, "a", 1.0, 1, 4.0), row(recipe, "a", 2.0, 1, 3.0), row(recipe, "a", 2.0, 2, 3.5)]
    lines = recipe.table(PLAN, [*rows, row(recipe, "b", 1.0, 1, 1.0)]).splitlines()
    assert lines[2] == "| muon | a | 1.5M | 2 | 3 | 3.250 | 2 | 3.000 - 3.500 |"
    assert "1 of 2 cells run" in lines[3]


@pytest.mark.slow
def test_cells_are_run_once_and_a_diverged_one_has_no_loss(recipe, tmp_path, capfd):
    config = config_file(tmp_path, "attention")
    plan = {
        "config": config,
        "common": ["train.steps=4"],
        "models": {"transformer": ["model.cms.periods=[1]"], "hope": ["model.cms.periods=[1,3]"]},
        "optimizers": {"adamw": {"set": ["optim.name=adamw"], "lr": [1e-2], "lr_elementwise": [1e-2, 1e30]}},
        "order": [["adamw", "hope"]],
        "seeds": [1, 2],
    }
    file, rows = tmp_path / "plan.yaml", tmp_path / "rows.json"
    file.write_text(yaml.safe_dump(plan))
    flags = ["--plan", str(file), "--data", str(tmp_path / "train"), str(tmp_path / "heldout"), "--json", str(rows)]
    flags += ["--out", str(tmp_path / "runs"), "--jobs", "2"]
    assert recipe.main(flags) == 0
    found = json.loads(rows.read_text())
    key = lambda row: (row["lr_elementwise"], row["seed"])
    losses = {key(row): row["heldout"] for row in found}
    assert losses.keys() == {(1e-2, 1), (1e-2, 2), (1e30, 1)}
    assert losses[1e30, 1] is None
    assert 2 < losses[1e-2, 1] < 5
    assert losses[1e-2, 1] != losses[1e-2, 2]
    assert {row["tokens"] for row in found} == {4 * 8 * 16}
    transformer = importlib.import_module("contestants").parameters(
        recipe.load(config, ["model.cms.periods=[1]"], check=False).model
    )
    assert [row["parameters"] for row in found] == pytest.approx([transformer] * 3, rel=0.02)
    assert "| adamw | hope |" in capfd.readouterr().out
    before = rows.read_text()
    assert recipe.main(flags) == 0  # nothing is left to do
    assert rows.read_text() == before


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=() if file.stem == "recipe_position" else pytest.mark.slow, id=file.stem)
        for file in sorted(BENCHMARKS.glob("recipe*.yaml"))
    ],
)
def test_every_cell_of_the_plans_is_a_configuration(recipe, file, monkeypatch):
    """A run would start it: nothing of it is refused, and an MLP makes it as large as the others. Every optimizer of a
    plan is given a grid of the same size."""
    plan = yaml.safe_load(file.read_text())
    path = str(recipe.ROOT / plan["config"])
    if file.name == "recipe_100m.yaml":  # its rates are the best of another plan
        plan["tuned"] = dict.fromkeys(map(tuple, plan["order"]), (1e-3, 1e-2))
    once = functools.cache(lambda path, words: load(path, list(words), check=False))
    monkeypatch.setattr(recipe, "load", lambda path, words, check: once(path, tuple(words)))
    sizes, sized = set(), set[str]()
    for optimizer, model in plan["order"]:
        cell, *others = recipe.grid(plan, optimizer, model)
        sizes.add(1 + len(others))
        words = recipe.words(plan, cell, ["a", "b"], Path("runs"))
        config = recipe.load(path, words, check=False) if model in sized else recipe.config_of(plan, cell, words)[0]
        sized.add(model)
        assert [problem.path for problem in validate_without_data(config, 1, path)] == ["data.train", "data.heldout"]
        assert config.train.eval_every == plan.get("eval_every", 0)
        assert config.checkpoint.every == plan.get("checkpoint_every", 0)
    assert len(sizes) == 1


@pytest.mark.parametrize("name", ["recipe", "recipe_ablation"])
def test_cells_that_have_a_row_are_cells_of_the_plan(recipe, name):
    """Else a finished cell would be run again under another name."""
    plan = yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())
    rows = json.loads((BENCHMARKS.parent / f"docs/measurements/{name}.json").read_text())
    cells, known = list(recipe.cells(plan, rows)), set(plan["models"])
    assert len(set(cells)) == len(cells)
    assert {row["model"] for row in rows} <= known
    done = set(cells) & {recipe.Cell.of(row) for row in rows}
    assert len(done) > len(cells) / 2


def test_models_of_one_name_are_one_model_in_all_plans(recipe):
    """So that rows of one plan can be handed to another."""
    plans = {file.stem: yaml.safe_load(file.read_text()) for file in BENCHMARKS.glob("recipe*.yaml")}
    first, shared = plans["recipe"], set()
    for name, plan in plans.items():
        if plan["common"] == first["common"]:
            known = plan["models"].keys() & first["models"].keys()
            shared |= {(name, model) for model in known}
            assert {m: recipe.flat(plan["models"][m]) for m in known} == {
                m: recipe.flat(first["models"][m]) for m in known
            }
    assert {"hope", "hope_attention", "transformer"} == {model for name, model in shared if name == "recipe_in_context"}


def test_lists_within_lists_are_words(recipe):
    assert recipe.flat(["a=1", ["b=2", ["c=3"]], "d=4"]) == ["a=1", "b=2", "c=3", "d=4"]


def test_a_run_that_fails_is_no_result(recipe, tmp_path, capfd):
    plan = {
        "config": config_file(tmp_path, "attention"),
        "common": [],
        "models": {"transformer": []},
        "optimizers": {"adamw": {"set": ["optim.name=adamw"], "lr": [1e-2], "lr_elementwise": [1e-2]}},
        "order": [["adamw", "transformer"]],
        "seeds": [1],
    }
    file, rows = tmp_path / "plan.yaml", tmp_path / "rows.json"
    file.write_text(yaml.safe_dump(plan))
    flags = ["--plan", str(file), "--data", str(tmp_path / "nothing"), str(tmp_path / "heldout"), "--json", str(rows)]
    assert recipe.main([*flags, "--out", str(tmp_path / "runs")]) == 1
    assert "exit code 2, see " in capfd.readouterr().out
    assert not rows.exists()


def test_a_run_that_was_cut_in_its_last_evaluation_is_no_result(recipe, tmp_path):
    """Its newest held-out loss is of an earlier step."""
    plan = {
        "config": config_file(tmp_path, "attention"), "common": ["train.steps=4"], "models": {"transformer": []},
        "optimizers": {"adamw": {"set": ["optim.name=adamw"]}},
    }  # fmt: skip
    args = argparse.Namespace(json=tmp_path / "rows.json", data=["t", "h"], out=tmp_path, seconds=99, jobs=1)
    runs, cell = recipe.Runs(plan, args), recipe.Cell("transformer", "adamw", 1e-2, 1e-2, 1)
    (tmp_path / cell.name).mkdir()

    def trained(last: float | None) -> None:
        records = [{"step": 2, "tokens": 9, "heldout_loss": 4.0}, {"step": 4, "tokens": 9, "heldout_loss": last}]
        (tmp_path / cell.name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    runs.started = lambda words, log, device: trained(None) or 0
    with pytest.raises(RuntimeError, match=f"remove .*{cell.name} and start again"):
        runs.run(cell, 0)
    runs.started = lambda words, log, device: trained(3.0) or 0
    assert runs.run(cell, 0)["heldout"] == 3.0


def test_the_picture_has_a_line_per_model_the_best_above(recipe):
    picture = importlib.import_module("recipe_picture")
    rows = [row(recipe, "b", 1.0, 1, 3.0), row(recipe, "b", 2.0, 1, 3.2), row(recipe, "b", 1.0, 2, 3.1)]
    rows += [row(recipe, "a", 1.0, 1, 3.5), row(recipe, "a", 2.0, 1, None)]
    found = picture.lines(PLAN, rows, "muon")
    assert list(found.items()) == [("b", ([3.0, 3.2], [3.0, 3.1])), ("a", ([3.5], [3.5]))]
    svg = picture.draw(found).svg()
    assert svg.index("3.050  2 seeds") < svg.index("3.500  1 seed")
    assert svg.count("<circle") == 3 + 3
    with pytest.raises(ValueError, match="no cell"):
        picture.draw(picture.lines(PLAN, rows, "adamw"))


def test_the_preset_of_muon_has_the_rates_that_were_best(recipe, tmp_path):
    """Of what is committed, for HOPE and its hybrid alike, and the plan's setting."""
    plan, rows = yaml.safe_load((BENCHMARKS / "recipe.yaml").read_text()), BENCHMARKS.parent / "docs/measurements"
    found = recipe.tuned_rates(plan, json.loads((rows / "recipe.json").read_text()))
    rates = lambda found: [f"optim.lr={found[0]}", f"optim.lr_elementwise={found[1]}"]
    optim = lambda words: load(config_file(tmp_path), words, check=False).optim
    preset = optim([str(BENCHMARKS.parent / "configs/optim/muon.yaml")])
    for model in ("hope", "hope_hybrid"):
        assert optim([*plan["optimizers"]["muon"]["set"], *rates(found["muon", model])]) == preset
