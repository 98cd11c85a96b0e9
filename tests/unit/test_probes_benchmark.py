"""benchmarks/probes.py: which cells are run, which rate counts, and the table."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import yaml

from configs.schema import load, validate_without_data
from hope.evaluate.probes.options import check, parser_of
from hope.evaluate.probes.protocols import PROTOCOLS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("probes")


def row(probe: str, model: str, rate: float, seed: int, *accuracies: float, size: int | None = 8) -> dict:
    tests = {f"T{n}": {"accuracy": {"value": value}, "state_bytes": size} for n, value in enumerate(accuracies)}
    return {"probe": probe, "model": model, "rate": rate, "seed": seed, "tests": tests}


def test_the_rate_that_counts_has_the_highest_mean_over_tests_and_seeds(probes):
    rows = [row("parity", "a", 0.1, 1, 1.0, 0.0), row("parity", "a", 0.1, 2, 0.2, 0.0),
            row("parity", "a", 0.2, 1, 0.5, 0.3), row("parity", "a", 0.2, 2, 0.5, 0.4)]  # fmt: skip
    assert probes.best_rows(rows) == {("parity", "a"): rows[2:]}
    first, _, line = probes.table(rows).splitlines()
    assert first == "| parity | rate | seeds | T0 | T1 | state bytes |"
    assert line == "| a | 0.2 | 2 | 50.0 (50.0 - 50.0) | 35.0 (30.0 - 40.0) | 8 |"


def test_probes_have_tables_of_their_own(probes):
    rows = [row("parity", "a", 0.1, 1, 1.0), row("needle", "b", 0.0, 1, 0.25, size=None)]
    parity, needle = probes.table(rows).split("\n\n")
    assert parity.splitlines()[2] == "| a | 0.1 | 1 | 100.0 | 8 |"
    assert needle.splitlines()[2] == "| b |  | 1 | 25.0 |  |"


def test_the_plan_of_the_family_asks_as_the_first_one_does(probes):
    first, family = (yaml.safe_load((BENCHMARKS / f"{n}.yaml").read_text()) for n in ("probes", "probes_family"))
    assert (family["config"], family["common"]) == (first["config"], first["common"])
    for name, how in family["probes"].items():
        assert how == first["probes"][name] | {"models": how["models"]}
    assert not set(family["models"]) & set(first["models"])


def test_cells_of_the_plan_seeds_last_and_none_twice(probes, tmp_path):
    plan = yaml.safe_load((BENCHMARKS / "probes.yaml").read_text())
    args = probes.arguments(["--json", str(tmp_path / "rows.json"), "--only", "parity"])
    cells = list(probes.Probes(plan, args).cells())
    how = plan["probes"]["parity"]
    assert [cell.seed for cell in cells] == [seed for seed in how["seeds"] for _ in how["models"]]
    assert len(set(cells)) == len(cells) == len(how["models"]) * len(how["rates"]) * len(how["seeds"])
    done = [{**cell._asdict(), "tests": {"T8": {}}} for cell in cells[:-1]]
    args.json.write_text(json.dumps(done))
    assert probes.Probes(plan, args).next() == cells[-1]


@pytest.mark.parametrize("name", [pytest.param("probes", marks=pytest.mark.slow), "probes_family"])
def test_every_model_of_the_plan_can_be_built(probes, name):
    """As the program builds it: with the probe's vocabulary and layers. And needle's runs are configurations."""
    plan = yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())
    for probe, how in plan["probes"].items():
        for model in how["models"]:
            words = [*plan["common"], *probes.flat(plan["models"][model])]
            args = parser_of(None).parse_args([probe, "config", *how["options"]])
            check(args)
            made = dataclasses.replace(
                load(str(probes.ROOT / plan["config"]), words, check=False).model,
                vocab_size=PROTOCOLS[probe].train[0][0].vocab_size, layers=args.layers or PROTOCOLS[probe].layers,
            )  # fmt: skip
            assert list(made.problems()) == []
    for words in plan.get("needle", {"models": {}})["models"].values():
        given = [*plan["needle"]["common"], *probes.flat(words), "data.train=a", "data.heldout=b", "run.name=x"]
        path = str(probes.ROOT / plan["needle"]["config"])
        config = load(path, given, check=False)
        assert [problem.path for problem in validate_without_data(config, 1, path)] == ["data.train", "data.heldout"]
        assert config.checkpoint.every == config.train.steps  # the needle is asked of its checkpoint


def test_finished_cells_are_not_run_again(probes):
    rows = BENCHMARKS.parent / "docs/measurements/probes.json"
    args = probes.arguments(["--json", str(rows), "--only", "mqar", "parity", "s5", "palindrome"])
    found = probes.Probes(yaml.safe_load((BENCHMARKS / "probes.yaml").read_text()), args)
    done = {found.cell_of(row) for row in found.rows if row["probe"] != probes.NEEDLE}
    assert done
    assert done <= set(found.cells())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "parity"], "--json is needed"),
        (["--json", "x", "--only", "chess"], "chess"),
        (["--json", "x", "--only", "needle"], "needs --data, --tokenizer and --haystack"),
    ],
)
def test_what_cannot_work_is_said(probes, flags, said, capsys):
    with pytest.raises(SystemExit):
        probes.arguments(flags)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_cells_are_run_once(probes, tmp_path, capfd):
    plan = yaml.safe_load((BENCHMARKS / "probes.yaml").read_text())
    plan["common"] = ["model.width=16", "model.heads=2", "model.cms.hidden=16"]
    plan["probes"] = {"parity": {
        "options": ["--steps", "2", "--batch", "2", "--tested", "4", "--layers", "1", "--device", "cpu"],
        "models": ["transformer", "hope_erase_1.9"], "rates": [1e-3], "seeds": [1],
    }}  # fmt: skip
    file, rows = tmp_path / "plan.yaml", tmp_path / "rows.json"
    file.write_text(yaml.safe_dump(plan))
    flags = ["--plan", str(file), "--json", str(rows), "--out", str(tmp_path / "out")]
    assert probes.main(flags) == 0
    found = json.loads(rows.read_text())
    assert {r["model"]: (r["steps"], r["batch"], r["layers"], list(r["tests"])) for r in found} == {
        model: (2, 2, 1, ["T40", "T128", "T256"]) for model in ("transformer", "hope_erase_1.9")
    }
    before = rows.read_text()
    assert probes.main(flags) == 0  # nothing is left to do
    assert rows.read_text() == before
    assert "| hope_erase_1.9 | 0.001 | 1 |" in capfd.readouterr().out


def test_the_picture_has_a_panel_per_probe_and_means_over_seeds(probes, tmp_path):
    drawn = importlib.import_module("probes_picture")
    needle = {"tests": {f"{kind}.T{n}": {"accuracy": {"value": 0.0}, "nats_per_token": {"value": value}}
              for kind, n, value in (("a", 1, 2.0), ("b", 1, 4.0), ("a", 2, 5.0), ("b", 2, 7.0))}}  # fmt: skip
    rows = [row("parity", "hope", 0.1, 1, 1.0, 0.0), row("parity", "hope", 0.1, 2, 0.5, 0.2),
            row("parity", "x", 0.1, 1, 0.9, 0.3), row("needle", "hope", 0.0, 1) | needle]  # fmt: skip
    parity, of_needle = drawn.panels(rows)
    assert parity.tests == ["T0", "T1"]
    assert parity.models == {"hope": pytest.approx([75.0, 10.0]), "x": pytest.approx([90.0, 30.0])}
    assert of_needle.models == {"hope": [3.0, 6.0]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert drawn.main([str(tmp_path / "rows.json"), str(tmp_path / "out.svg"), "--without", "needle"]) == 0
    svg = (tmp_path / "out.svg").read_text()
    assert "parity, %" in svg
    assert "nats" not in svg
    assert svg.count("<polyline") == len(parity.models) + 6  # and the grid's lines
    with pytest.raises(ValueError, match="no rows"):
        drawn.draw([])
